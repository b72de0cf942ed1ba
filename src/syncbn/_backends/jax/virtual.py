"""Virtual ("ghost") batches: a few examples of a replica that normalize by themselves.

Only the moving statistics are synchronized, so that JAX's own gradient is the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from syncbn._backends.interface import Batch, Scheme
from syncbn._backends.jax import collectives
from syncbn._backends.jax.collectives import Replicas
from syncbn._backends.jax.passes import statistics_dtype, where_counted
from syncbn._backends.jax.places import Stages
from syncbn.errors import InputError
from syncbn.moments import Moments, as_divisor, merge_table

__all__ = ["stages"]


def stages(batch: Batch, scheme: Scheme, replicas: Replicas) -> Stages:
    """Normalize every `virtual_batch_size` examples by their own moments, the last fewer by theirs.

    Returns:
        Functions of a replica's part. The first gives the moments of the union of all examples of
        all replicas, twice; one collective. The second takes them and has no use for them.

    Raises:
        InputError: the channels are where the examples should be.
    """
    axis = batch.axis % batch.inputs.ndim
    size = scheme.virtual_batch_size or 1
    if axis == 0:
        raise InputError(
            "virtual_batch_size requires examples on the first axis of the inputs. Received: "
            f"axis={batch.axis} for inputs of rank {batch.inputs.ndim}, whose channels are there. "
            "Remove virtual_batch_size."
        )

    def of_union(x: Any, weights: Any | None) -> tuple[Moments, Moments]:
        moments, _, _ = _moments(_Layout.of(x, weights, axis, size))
        dtype = collectives.moments_dtype()
        # A row for each virtual batch, of which only the count and the channels are left.
        rows = [part.reshape(-1, part.shape[-1]).astype(dtype) for part in moments]
        table = jnp.concatenate(rows, axis=1)
        local = merge_table(table, jnp, one_count=rows[0].shape[1] == 1)
        _, union = collectives.exchange(local, replicas)
        return union, union

    def outputs(x: Any, weights: Any | None, _: Moments, gamma: Any, beta: Any) -> Any:
        layout = _Layout.of(x, weights, axis, size)
        y = layout.restored(_normalized(layout, gamma, beta, scheme.epsilon).astype(x.dtype))
        return y if scheme.activation is None else scheme.activation(y)

    # The backward computes it all again, and keeps no copy of the input by virtual batch.
    return Stages(of_union, jax.checkpoint(outputs))


def _normalized(layout: _Layout, gamma: Any, beta: Any, epsilon: float) -> Any:
    moments, rough, rest = _moments(layout)
    scale = lax.rsqrt(moments.variance(jnp) + epsilon) * gamma
    # The mean is in two parts: `x − rough` is exact where the mean is large.
    offset = beta - rest * scale
    # What is masked gets an output by the statistics, and no gradient goes through it.
    return jnp.where(
        layout.weights > 0,
        (where_counted(layout.weights, layout.x) - rough) * scale + offset,
        lax.stop_gradient((layout.x - rough) * scale + offset),
    )


class _Layout(NamedTuple):
    """The examples by virtual batch, filled up with elements of weight 0."""

    x: Any  # shape (virtual batches, examples of one, …, channels)
    weights: Any  # the same, but 1 or all channels
    restored: Callable[[Any], Any]  # from the shape of x to that of the inputs

    @classmethod
    def of(cls, inputs: Any, weights: Any | None, axis: int, size: int) -> _Layout:
        dtype = statistics_dtype(inputs.dtype)
        x = jnp.moveaxis(inputs.astype(dtype), axis, -1)
        weights = jnp.ones([1] * x.ndim, dtype) if weights is None else weights.astype(dtype)
        weights = jnp.moveaxis(weights, axis, -1)
        examples = x.shape[0]
        # No more than there are, or the batch would be filled up to any size.
        size = min(size, max(examples, 1))
        missing = -examples % size

        def by_batch(tensor: Any) -> Any:
            tensor = jnp.broadcast_to(tensor, (*x.shape[:-1], tensor.shape[-1]))
            tensor = jnp.pad(tensor, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
            return tensor.reshape((examples + missing) // size, size, *tensor.shape[1:])

        def restored(y: Any) -> Any:
            return jnp.moveaxis(y.reshape(-1, *x.shape[1:])[:examples], -1, axis)

        return cls(by_batch(x), by_batch(weights), restored)


def _moments(layout: _Layout) -> tuple[Moments, Any, Any]:
    """Moments of each virtual batch, shape (batches, 1, …, C), and the two parts of the mean."""

    def total(values: Any) -> Any:
        return jnp.sum(values, axis=tuple(range(1, values.ndim - 1)), keepdims=True)

    count = total(layout.weights)
    divisor = as_divisor(count, jnp)
    # A mean that is only nearly right, which everything below is independent of.
    counted = where_counted(layout.weights, layout.x)
    rough = _as_stored(lax.stop_gradient(total(layout.weights * counted) / divisor))
    deviations = where_counted(layout.weights, layout.x - rough)
    rest = total(layout.weights * deviations) / divisor
    m2 = total(layout.weights * jnp.square(deviations)) - count * jnp.square(rest)
    return Moments(count, rough + rest, jnp.maximum(m2, 0)), rough, rest


def _as_stored(numbers: Any) -> Any:
    """The numbers without their last bit: the same wherever they are used.

    XLA computes them again in each loop that uses them, and LLVM makes `x − sum · inverse` one
    operation there, which does not round the product. Nothing of that goes through integers.
    """
    bits = jnp.int64 if numbers.dtype == jnp.float64 else jnp.int32
    kept = lax.bitcast_convert_type(numbers, bits) & jnp.asarray(-2, bits)
    return lax.bitcast_convert_type(kept, numbers.dtype)
