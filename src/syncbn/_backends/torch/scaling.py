"""What normalizes and what its gradient sums: vectors of the size of the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from syncbn._backends.torch.namespace import xp
from syncbn.moments import Moments, as_divisor

__all__ = ["Correction", "CotangentSums", "Kernel", "Scaling", "statistics_dtype"]


class Scaling(NamedTuple):
    """The C-sized vectors that normalize: `y = (x − mean) · scale + offset`.

    The mean is in two parts. At large means the distance between two float32 numbers is a visible
    part of a standard deviation: `x − mean` is exact, and what the mean lacks goes into the offset.
    """

    mean: Any  # shape (C,)
    mean_rest: Any  # shape (C,): the mean less `mean`, smaller than its rounding
    inverse: Any  # shape (C,): 1 / √(variance + epsilon)
    scale: Any  # shape (C,): gamma · inverse
    offset: Any  # shape (C,): beta, less what the mean lacks, scaled

    @classmethod
    def of(cls, moments: Moments, gamma: Any, beta: Any, epsilon: float) -> Scaling:
        """In the dtype of gamma, whatever that of the moments."""
        dtype = gamma.dtype
        mean = moments.mean.to(dtype)
        rest = (moments.mean - mean).to(dtype)
        inverse = torch.rsqrt(moments.variance(xp) + epsilon).to(dtype)
        scale = gamma * inverse
        return cls(mean, rest, inverse, scale, beta - rest * scale)


class CotangentSums(NamedTuple):
    """What the gradient needs to know of a replica's part, a channel each."""

    outputs: Any  # shape (C,): Σ dy; also the gradient of beta
    deviations: Any  # shape (C,): Σ dy · (x − mean), with the mean without its rest

    def normalized(self, scaling: Scaling) -> Any:
        """`Σ dy·x̂`, shape (C,): the gradient of gamma."""
        return (self.deviations - scaling.mean_rest * self.outputs) * scaling.inverse


class Correction(NamedTuple):
    """What is taken from dy: `dx = scale · (dy − w · ((x − mean) · slope + offset))`."""

    slope: Any  # shape (C,): Σ dy·x̂ / n, times inverse
    offset: Any  # shape (C,): Σ dy / n, less what the mean lacks

    @classmethod
    def of(cls, total: Any, count: Any, scaling: Scaling) -> Correction:
        """From the packed sums `(Σ dy, Σ dy·x̂)`, shape (2C,), and the count of the whole batch."""
        divisor = as_divisor(count, xp).to(total.dtype)
        outputs, normalized = (sums / divisor for sums in total.chunk(2))
        slope = normalized * scaling.inverse
        return cls(slope, outputs - slope * scaling.mean_rest)


class Kernel(NamedTuple):
    """The four passes over one replica's part, any shape with the channels last, any strides.

    Weights, where there are any, have its rank, each axis of its size or 1. An element of weight 0
    does not exist: `where` leaves it out, since 0 · NaN is NaN.
    """

    # (x, weights, dtype) -> moments in that dtype
    moments: Callable[[Any, Any | None, Any], Moments]
    # (x, scaling) -> y, in the dtype of x
    apply: Callable[[Any, Scaling], Any]
    # (dy, x, weights, scaling) -> the sums, in the dtype of scaling
    sums: Callable[[Any, Any, Any | None, Scaling], CotangentSums]
    # (dy, x, weights, scaling, correction) -> dx, in the dtype of dy
    gradient: Callable[[Any, Any, Any | None, Scaling, Correction], Any]


def statistics_dtype(dtype: Any) -> Any:
    """The dtype that inputs of this one are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
