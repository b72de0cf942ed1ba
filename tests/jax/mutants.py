"""The defects of `tests/mutants.py` as they are on JAX.

Where `shard_map` checks who varies JAX itself refuses some of them; contexts without that check,
`shard_map unchecked`, `pmap` and `vmap`, run them, and the tests there must notice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from tests.mutants import MUTANTS as TENSORFLOW

from syncbn._backends.jax import collectives, gradients, passes
from syncbn.moments import Moments


def _never_synchronizes() -> None:
    """Every replica sums over itself alone."""
    collectives.sum_over_replicas = lambda vector, _: vector


def _equal_weights() -> None:
    """A mean of means: every replica counts the same, however many elements it has."""
    exchange = collectives.exchange

    def of_equals(local: Moments, replicas: Any) -> Any:
        one = jnp.ones_like(local.count)
        return exchange(Moments(one, local.mean, local.variance(jnp)), replicas)

    collectives.exchange = of_equals


def _local_backward() -> None:
    """The statistics are global, the gradient treats them as local."""
    collectives.sum_over_group = lambda vector, _: (vector, None)


def _folded_sum_of_squares() -> None:
    """Variance as E[x²] − E[x]² in float32."""

    def moments(x: Any, _: Any, axis: int, dtype: Any) -> Moments:
        others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
        count = jnp.asarray(x.size // x.shape[axis], dtype)
        mean = jnp.mean(x, axis=others)
        m2 = jnp.maximum(jnp.mean(x * x, axis=others) - mean**2, 0) * count
        return Moments(count, mean, m2)

    passes.local_moments = moments


def _mask_is_a_factor() -> None:
    """What is masked is multiplied by 0, which leaves a NaN a NaN."""
    passes.where_counted = lambda _, x: x


def _weights_are_a_mask() -> None:
    """Every element of a weight counts the same."""
    moments = passes.local_moments

    def of_mask(x: Any, weights: Any, *rest: Any) -> Moments:
        return moments(x, None if weights is None else (weights > 0).astype(weights.dtype), *rest)

    passes.local_moments = of_mask


def _groups_move_apart() -> None:
    """Each group keeps moving statistics of its own."""
    exchange = collectives.exchange
    collectives.exchange = lambda *arguments: (exchange(*arguments)[0],) * 2


def _two_collectives() -> None:
    """Right results, by one collective more than the contract allows."""
    collectives.sum_over_replicas = lambda vector, axes: lax.psum(
        lax.psum(vector, axes) * 0 + vector, axes
    )


def _weights_gradients_stay_local() -> None:
    """Each replica has its own share, also where JAX takes it for the sum."""
    gradients.summed_like = lambda cotangent, primal: (
        lax.pmean(cotangent, tuple(extra))
        if (extra := gradients.varying(cotangent) - gradients.varying(primal))
        else cotangent
    )
    sum_over_group = collectives.sum_over_group
    collectives.sum_over_group = lambda *arguments: (sum_over_group(*arguments)[0], None)


MUTANTS: dict[str, Callable[[], None]] = {
    "empty_batches_count": TENSORFLOW["empty_batches_count"],
    "equal_weights": _equal_weights,
    "folded_sum_of_squares": _folded_sum_of_squares,
    "groups_move_apart": _groups_move_apart,
    "local_backward": _local_backward,
    "mask_is_a_factor": _mask_is_a_factor,
    "never_synchronizes": _never_synchronizes,
    "two_collectives": _two_collectives,
    "weights_are_a_mask": _weights_are_a_mask,
    "weights_gradients_stay_local": _weights_gradients_stay_local,
}

CONTEXT = "tests/jax/test_contexts.py::test_a_feature_gives_what_one_device_gives_in_every_context"
COUNT = "tests/jax/test_collectives.py::test_two_collectives_a_layer_in_the_train_step_of_keras"
EMPTY = (
    "tests/jax/test_contexts.py"
    "::test_a_batch_without_any_element_leaves_the_moving_statistics_untouched"
)
SHARED = "tests/jax/test_derivatives.py::test_gradients_of_shared_weights_are_those_of_one_device"
VARIANCE = "tests/contract/test_precision.py::test_variance_at_a_large_mean"

# A few tests a mutant, of those that must notice it; each of them passes without it.
NOTICED_BY: dict[str, list[str]] = {
    "empty_batches_count": [f"{EMPTY}[shard_map]"],
    "equal_weights": [f"{CONTEXT}[shard_map-uneven]", f"{CONTEXT}[vmap-empty replica]"],
    "folded_sum_of_squares": [f"{VARIANCE}[1000.0-0.0001]"],
    "groups_move_apart": [f"{CONTEXT}[shard_map unchecked-groups]"],
    "local_backward": [f"{CONTEXT}[shard_map-uneven]", f"{CONTEXT}[data parallel-equal]"],
    "mask_is_a_factor": [f"{CONTEXT}[shard_map-uneven]"],
    "never_synchronizes": [
        f"{CONTEXT}[shard_map unchecked-equal]",
        f"{CONTEXT}[pmap-equal]",
        f"{CONTEXT}[vmap-empty replica]",
    ],
    "two_collectives": [f"{COUNT}[1]"],
    "weights_are_a_mask": [f"{CONTEXT}[shard_map-mask and weights]"],
    "weights_gradients_stay_local": [f"{SHARED}[check_vma]"],
}
