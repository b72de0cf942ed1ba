"""The passes over one replica's part, and the vectors of the size of the channels that they need.

Plain `jax.numpy`: XLA fuses each into one loop over its inputs, casts from half precision included,
and adds in a tree, so that many elements wear out no float32 sum.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from syncbn.moments import Moments, as_divisor

__all__ = [
    "Correction",
    "Scaling",
    "apply",
    "gradient",
    "local_moments",
    "statistics_dtype",
    "sums",
    "where_counted",
]


def statistics_dtype(dtype: Any) -> Any:
    """The dtype that inputs of this one are computed in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


class Scaling(NamedTuple):
    """What normalizes: `y = (x − mean) · scale + offset`, each of shape (C,).

    The mean is in two parts. At large means the distance between two float32 numbers is a visible
    part of a standard deviation: `x − mean` is exact, and what the mean lacks goes into the offset.
    """

    mean: Any
    mean_rest: Any  # the mean less `mean`, smaller than its rounding; 0 without float64
    inverse: Any  # 1 / √(variance + epsilon)
    scale: Any  # gamma · inverse

    @classmethod
    def of(cls, moments: Moments, gamma: Any, epsilon: float) -> Scaling:
        """In the dtype of gamma, whatever that of the moments."""
        mean = moments.mean.astype(gamma.dtype)
        rest = (moments.mean - mean.astype(moments.mean.dtype)).astype(gamma.dtype)
        inverse = lax.rsqrt(moments.variance(jnp).astype(gamma.dtype) + epsilon)
        return cls(mean, rest, inverse, gamma * inverse)


class Correction(NamedTuple):
    """What is taken from dy: `dx = scale · (dy − w · ((x − mean) · slope + offset))`."""

    slope: Any  # shape (C,): Σ dy·x̂ / n, times inverse
    offset: Any  # shape (C,): Σ dy / n, less what the mean lacks

    @classmethod
    def of(cls, total: Any, count: Any, scaling: Scaling) -> Correction:
        """From `sums` of the whole batch, shape (2, C), and its count."""
        outputs, normalized = total / as_divisor(count, jnp).astype(total.dtype)
        slope = normalized * scaling.inverse
        return cls(slope, outputs - slope * scaling.mean_rest)


def local_moments(x: Any, weights: Any | None, axis: int, dtype: Any) -> Moments:
    """Moments in two passes: first the mean, then the deviations from it.

    Args:
        x: any rank, channels on `axis`.
        weights: of the same rank, each axis of its size or 1; 0 for what does not exist.
        axis: that of the channels.
        dtype: to compute in.
    """
    wide = where_counted(weights, x).astype(dtype)
    others = _others(x.ndim, axis)
    if weights is None:
        count = jnp.asarray(math.prod(x.shape[i] for i in others), dtype)
        factor = 1
    else:
        factor = weights.astype(dtype)
        count = _count(factor, x.shape, axis)
    mean = jnp.sum(factor * wide, axis=others) / as_divisor(count, jnp)
    m2 = jnp.sum(factor * jnp.square(wide - _along(mean, wide, axis)), axis=others)
    return Moments(count, mean, m2)


def _count(weights: Any, shape: tuple[int, ...], axis: int) -> Any:
    """The sum of the weights: one for all channels, or shape (C,)."""
    others = _others(len(shape), axis)
    repeated = math.prod(shape[i] for i in others if weights.shape[i] == 1)
    total = jnp.sum(weights, axis=others) * repeated
    return total[0] if weights.shape[axis] == 1 else total


def apply(x: Any, scaling: Scaling, beta: Any, axis: int) -> Any:
    """The outputs, in the dtype of x."""
    offset = beta - scaling.mean_rest * scaling.scale
    deviations = x.astype(beta.dtype) - _along(scaling.mean, x, axis)
    return (deviations * _along(scaling.scale, x, axis) + _along(offset, x, axis)).astype(x.dtype)


def sums(dy: Any, x: Any, weights: Any | None, scaling: Scaling, axis: int) -> Any:
    """`Σ dy` and `Σ dy·x̂`, the gradients of beta and gamma, shape (2, C).

    Not one behind the other: where XLA splits the channels over devices, they stay there.
    """
    others = _others(x.ndim, axis)
    dy, x = _counted(dy, x, weights, scaling)
    outputs = jnp.sum(dy, axis=others)
    deviations = jnp.sum(dy * (x - _along(scaling.mean, x, axis)), axis=others)
    normalized = (deviations - scaling.mean_rest * outputs) * scaling.inverse
    return jnp.stack([outputs, normalized])


def gradient(
    dy: Any, x: Any, weights: Any | None, scaling: Scaling, correction: Correction, axis: int
) -> Any:
    """dx, in the dtype of x."""
    wide_dy, wide_x = _counted(dy, x, weights, scaling)
    corrections = (wide_x - _along(scaling.mean, x, axis)) * _along(correction.slope, x, axis)
    corrections += _along(correction.offset, x, axis)
    if weights is not None:
        corrections *= weights.astype(corrections.dtype)
    return ((wide_dy - corrections) * _along(scaling.scale, x, axis)).astype(x.dtype)


def where_counted(weights: Any | None, x: Any) -> Any:
    """The array with 0 in place of what has no weight: as a factor 0 would leave a NaN a NaN."""
    return x if weights is None else jnp.where(weights > 0, x, jnp.zeros((), x.dtype))


def _counted(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> tuple[Any, Any]:
    dtype = scaling.scale.dtype
    return tuple(where_counted(weights, array.astype(dtype)) for array in (dy, x))


def _others(rank: int, axis: int) -> tuple[int, ...]:
    """Every axis but that of the channels."""
    return tuple(i for i in range(rank) if i != axis % rank)


def _along(vector: Any, x: Any, axis: int) -> Any:
    """A vector of the size of the channels as it is broadcast against x."""
    return jnp.expand_dims(vector, _others(x.ndim, axis))
