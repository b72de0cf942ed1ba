"""Defects put into the library on purpose: the suite must fail with each of them.

Chosen by the environment variable SYNCBN_MUTANT; `tests/meta/test_mutants.py` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable


def _never_synchronizes() -> None:
    """Every replica sums over itself alone."""
    from syncbn._backends.tensorflow import collectives

    collectives.sum_over_replicas = lambda vector: vector


def _equal_weights() -> None:
    """A mean of means: every replica counts the same, however many elements it has."""
    import tensorflow as tf

    from syncbn._backends.tensorflow import collectives
    from syncbn.moments import Moments

    def global_moments(local: Moments) -> Moments:
        replicas = collectives.replica_count()
        variance = local.m2 / tf.maximum(local.count, 1)
        packed = tf.stack([local.mean, variance + local.mean**2]) / replicas
        mean, square = tf.unstack(collectives.sum_over_replicas(packed))
        count = local.count * replicas
        return Moments(count, mean, (square - mean**2) * count)

    collectives.global_moments = global_moments


def _local_backward() -> None:
    """The statistics are global, the gradient treats them as local."""
    from syncbn._backends.tensorflow import normalize

    normalize._sum_over_replicas = lambda sums: sums


def _folded_sum_of_squares() -> None:
    """Variance as E[x²] − E[x]² in float32, as Keras's synchronized=True computes it."""
    import tensorflow as tf

    from syncbn._backends.tensorflow import collectives
    from syncbn.moments import Moments

    def global_moments(local: Moments) -> Moments:
        count, mean, m2 = (tf.cast(part, tf.float32) for part in local)
        packed = tf.stack([mean * count, m2 + count * mean**2, tf.zeros_like(mean) + count])
        total, squares, counts = tf.unstack(collectives.sum_over_replicas(packed))
        mean = total / counts
        return Moments(counts[0], mean, tf.maximum(squares / counts - mean**2, 0.0) * counts)

    collectives.global_moments = global_moments


def _two_collectives() -> None:
    """Right results, by one collective more than the contract allows."""
    from syncbn._backends.tensorflow import collectives

    packed_sum = collectives.sum_over_replicas
    collectives.sum_over_replicas = lambda vector: packed_sum(packed_sum(vector) * 0 + vector)


MUTANTS: dict[str, Callable[[], None]] = {
    "equal_weights": _equal_weights,
    "folded_sum_of_squares": _folded_sum_of_squares,
    "local_backward": _local_backward,
    "never_synchronizes": _never_synchronizes,
    "two_collectives": _two_collectives,
}


def apply(name: str) -> None:
    """Put the named defect in; none for an empty name."""
    if name:
        MUTANTS[name]()
