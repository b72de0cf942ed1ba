"""Defects put into the library on purpose: the suite must fail with each of them.

Chosen by the environment variable SYNCBN_MUTANT; `tests/meta/test_mutants.py` runs them all.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def _never_synchronizes() -> None:
    """Every replica sums over itself alone."""
    from syncbn._backends.tensorflow import collectives

    collectives.sum_over_replicas = lambda vector: vector


def _equal_weights() -> None:
    """A mean of means: every replica counts the same, however many elements it has."""
    import tensorflow as tf

    from syncbn._backends.tensorflow import collectives
    from syncbn.moments import Moments

    def exchange(local: Moments, *_: Any) -> Any:
        replicas = collectives.replica_count()
        variance = local.m2 / tf.maximum(local.count, 1)
        packed = tf.stack([local.mean, variance + local.mean**2]) / replicas
        mean, square = tf.unstack(collectives.sum_over_replicas(packed))
        count = local.count * replicas
        moments = Moments(count, mean, (square - mean**2) * count)
        return collectives.Exchanged(moments, moments, None)

    collectives.exchange = exchange


def _local_backward() -> None:
    """The statistics are global, the gradient treats them as local."""
    from syncbn._backends.tensorflow import collectives

    collectives.sum_over_group = lambda vectors, *_: vectors


def _folded_sum_of_squares() -> None:
    """Variance as E[x²] − E[x]² in float32, as Keras's synchronized=True computes it."""
    import tensorflow as tf

    from syncbn._backends.tensorflow import collectives
    from syncbn.moments import Moments

    def exchange(local: Moments, *_: Any) -> Any:
        count, mean, m2 = (tf.cast(part, tf.float32) for part in local)
        packed = tf.stack([mean * count, m2 + count * mean**2, tf.zeros_like(mean) + count])
        total, squares, counts = tf.unstack(collectives.sum_over_replicas(packed))
        mean = total / counts
        m2 = tf.maximum(squares / counts - mean**2, 0.0) * counts
        moments = Moments(counts[0], mean, m2)
        return collectives.Exchanged(moments, moments, None)

    collectives.exchange = exchange


def _masked_is_local() -> None:
    """Once there is a mask nobody synchronizes, as in Keras."""
    from syncbn._backends.tensorflow import collectives, fused

    moments = fused.weighted_moments

    def weighted_moments(*arguments: Any) -> Any:
        collectives.sum_over_replicas = lambda vector: vector
        return moments(*arguments)

    fused.weighted_moments = weighted_moments


def _mask_is_a_factor() -> None:
    """What is masked is multiplied by 0, which leaves a NaN a NaN."""
    from syncbn._backends.tensorflow import composed, fused

    for module in (composed, fused):
        module.where_counted = lambda _, x: x


def _weights_are_a_mask() -> None:
    """Every element of a weight counts the same."""
    import tensorflow as tf

    from syncbn._backends.tensorflow import views

    of = views.View.of.__func__

    def view_of(cls: Any, *arguments: Any) -> Any:
        view = of(cls, *arguments)
        return view._replace(
            of_weights=lambda w: view.of_weights(tf.cast(tf.cast(w, tf.bool), w.dtype))
        )

    views.View.of = classmethod(view_of)


def _groups_move_apart() -> None:
    """Each group keeps moving statistics of its own."""
    from syncbn._backends.tensorflow import collectives

    exchange = collectives.exchange

    def of_own_group(*arguments: Any) -> Any:
        exchanged = exchange(*arguments)
        return exchanged._replace(union=exchanged.own)

    collectives.exchange = of_own_group


def _empty_batches_count() -> None:
    """An empty batch moves the moving statistics towards zero."""
    from keras import ops

    from syncbn import moving

    cast = ops.cast

    def any_element(x: Any, dtype: Any) -> Any:
        return ops.ones_like(cast(x, dtype)) if x.dtype == "bool" else cast(x, dtype)

    moving.ops = SimpleNamespace(**{**vars(ops), "cast": any_element})


def _two_collectives() -> None:
    """Right results, by one collective more than the contract allows."""
    from syncbn._backends.tensorflow import collectives

    packed_sum = collectives.sum_over_replicas
    collectives.sum_over_replicas = lambda vector: packed_sum(packed_sum(vector) * 0 + vector)


MUTANTS: dict[str, Callable[[], None]] = {
    "empty_batches_count": _empty_batches_count,
    "equal_weights": _equal_weights,
    "folded_sum_of_squares": _folded_sum_of_squares,
    "groups_move_apart": _groups_move_apart,
    "local_backward": _local_backward,
    "mask_is_a_factor": _mask_is_a_factor,
    "masked_is_local": _masked_is_local,
    "never_synchronizes": _never_synchronizes,
    "two_collectives": _two_collectives,
    "weights_are_a_mask": _weights_are_a_mask,
}


def of_backend(backend: str) -> dict[str, Callable[[], None]]:
    """The mutants of one of Keras's backends; those here are TensorFlow's."""
    if backend == "tensorflow":
        return MUTANTS
    mutants: dict[str, Callable[[], None]]
    mutants = importlib.import_module(f"tests.{backend}.mutants").MUTANTS
    return mutants


def apply(name: str) -> None:
    """Put the named defect in; none for an empty name."""
    if name:
        of_backend(os.environ.get("KERAS_BACKEND", "tensorflow"))[name]()
