"""Passes by torch's elementary operations: with weights, compiled, gradients of gradients.

`torch.compile` fuses them into one loop a pass. All of them are torch's own to derive.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from syncbn._backends.torch.namespace import xp
from syncbn._backends.torch.scaling import Correction, CotangentSums, Kernel, Scaling
from syncbn.moments import Moments, as_divisor

__all__ = ["composed", "where_counted", "with_few_digits"]


def where_counted(weights: Any | None, x: Any) -> Any:
    """The tensor with 0 in place of what has no weight."""
    return x if weights is None else torch.where(weights > 0, x, 0.0)


def _sum(x: Any) -> Any:
    """The sum of each channel; torch adds up in a cascade, so that float32 loses no digits."""
    return x.sum(dim=tuple(range(x.dim() - 1)))


def _counts(x: Any, weights: Any | None, dtype: Any) -> Any:
    """The number of elements of a channel, or the sum of their weights: shape (), or (C,)."""
    if weights is None:
        return torch.full((), math.prod(x.shape[:-1]), dtype=dtype, device=x.device)
    # Each axis is of the full size or 1. As a list: torch.compile cannot trace a generator here.
    sizes = list(zip(x.shape[:-1], weights.shape[:-1], strict=True))
    repeated = math.prod([size for size, own in sizes if own == 1])
    count = _sum(weights.to(dtype)) * repeated
    return count[0] if weights.shape[-1] == 1 else count


def _about(mean: Any, x: Any, weights: Any | None, count: Any) -> Moments:
    """Moments in the dtype of the count, from a mean that is nearly right."""
    deviations = where_counted(weights, x - mean)
    weighted = deviations if weights is None else weights * deviations
    rest = _sum(weighted).to(count.dtype) / as_divisor(count, xp)
    m2 = _sum(weighted * deviations).to(count.dtype) - count * rest * rest
    return Moments(count, mean.to(count.dtype) + rest, torch.clamp(m2, min=0))


def with_few_digits(mean: Any) -> Any:
    """The mean to twelve bits, so that `x − mean` is rounded seldom.

    With more digits than x has, all x between two powers of two would be rounded the same way, and
    their mean with them.
    """
    if mean.dtype != torch.float32:
        return mean
    return (mean.view(torch.int32) & -(2**12)).view(torch.float32)


def _moments(x: Any, weights: Any | None, dtype: Any) -> Moments:
    """Moments in two passes: first the mean, then the deviations from it."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    counted = where_counted(weights, x)
    count = _counts(x, weights, dtype)
    if weights is not None:
        weights = weights.to(x.dtype)
        counted = weights * counted
    # What is taken for the mean here does not change the moments, nor their derivative.
    rough = (_sum(counted.detach()).to(dtype) / as_divisor(count, xp)).to(x.dtype)
    return _about(with_few_digits(rough), x, weights, count)


def _apply(x: Any, scaling: Scaling) -> Any:
    wide = x.to(scaling.scale.dtype)
    return ((wide - scaling.mean) * scaling.scale + scaling.offset).to(x.dtype)


def _sums(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> CotangentSums:
    dy, deviations = _counted(dy, x, weights, scaling)
    return CotangentSums(_sum(dy), _sum(dy * deviations))


def _gradient(
    dy: Any, x: Any, weights: Any | None, scaling: Scaling, correction: Correction
) -> Any:
    wide, deviations = _counted(dy, x, weights, scaling)
    corrections = deviations * correction.slope + correction.offset
    if weights is not None:
        corrections = corrections * weights.to(corrections.dtype)
    return ((wide - corrections) * scaling.scale).to(dy.dtype)


def _counted(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> tuple[Any, Any]:
    """The cotangent and `x − mean` in the dtype of scaling, 0 where they do not count."""
    # In half precision the three terms of dx would each be rounded, and their small sum lost.
    dtype = scaling.scale.dtype
    deviations = x.to(dtype) - scaling.mean
    return where_counted(weights, dy.to(dtype)), where_counted(weights, deviations)


composed = Kernel(_moments, _apply, _sums, _gradient)
