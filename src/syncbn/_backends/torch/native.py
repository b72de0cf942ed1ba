"""Passes on a CPU by torch's own batch normalization, each of its kernels for what it is best at.

What costs time is memory that is written: the kernel of the gradient takes 2 ms for its two sums
alone and 8 with the tensor beside them, which is not yet the gradient. And each operation starts
and ends together on all cores, so few large ones are better than many small ones: on a busy machine
each waits for the slowest.
"""

from __future__ import annotations

from typing import Any

import torch

from syncbn._backends.torch.layout import Layout, pieces
from syncbn._backends.torch.namespace import xp
from syncbn._backends.torch.scaling import (
    Correction,
    CotangentSums,
    Kernel,
    Scaling,
    statistics_dtype,
)
from syncbn.moments import Moments, as_divisor

__all__ = ["native"]

# Elements of a piece, where what is between two operations is as large as x: 4 MB of float32.
_PIECE = 2**20

# In standard deviations: up to here `x · scale + (offset − mean · scale)`, as torch's kernel has
# it, is as good as `(x − mean) · scale + offset`.
_LARGE_MEAN = 4.0

# Rows that torch's kernel for the gradient adds up in one float32 number: a million would lose four
# digits.
_ROWS_A_SUM = 8192

# Sums that run side by side at no cost: with few channels, more of them for each.
_FREE_SUMS = 512


def _moments(x: Any, weights: Any | None, dtype: Any) -> Moments:  # noqa: ARG001
    """Moments in two passes: first the mean, then the deviations from it."""
    layout = Layout.of(x)
    view, wide = layout.view(x), statistics_dtype(x.dtype)
    dims = tuple(d for d in range(view.dim()) if d != 1)
    count = torch.tensor(view.numel() // view.shape[1], dtype=dtype)
    divisor = as_divisor(count, xp)
    sums = [part.to(wide).sum(dims).to(dtype) for (part,) in _in_width(view, wide)]
    rough = (sum(sums) / divisor).to(wide)
    pivot = layout.vector(rough)
    rests, squares = [], []
    for (part,) in pieces(view, size=_PIECE):
        deviations = part - pivot
        rests.append(deviations.sum(dims))
        squares.append(deviations.square_().sum(dims))
    # What the rough mean lacks, and what that has added to the squares.
    rest = torch.stack(rests).to(dtype).sum(0) / divisor
    m2 = torch.stack(squares).to(dtype).sum(0) - count * rest * rest
    return Moments(count, rough.to(dtype) + rest, torch.clamp(m2, min=0))


def _in_width(view: Any, wide: Any) -> list[tuple[Any, ...]]:
    """All at once, but where a conversion would need memory of the same size."""
    return [(view,)] if view.dtype == wide else pieces(view, size=_PIECE)


def _apply(x: Any, scaling: Scaling) -> Any:
    return _linear(x, scaling.mean, scaling.scale, scaling.offset, scaling).to(x.dtype)


def _linear(x: Any, mean: Any, slope: Any, offset: Any, scaling: Scaling) -> Any:
    """`(x − mean) · slope + offset` in the dtype of scaling, or in that of x."""
    if x.dtype != mean.dtype or bool((mean.abs() * scaling.inverse).max() > _LARGE_MEAN):
        return (x - mean).mul_(slope).add_(offset)
    layout = Layout.of(x)
    ones = torch.ones_like(mean)
    view = torch.nn.functional.batch_norm(
        layout.view(x), mean, ones, slope, offset, training=False, eps=0.0
    )
    return layout.restored(view)


def _sums(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> CotangentSums:  # noqa: ARG001
    layout = Layout.of(x)
    of_x, of_dy = layout.view(x), layout.view(dy)
    dtype, channels = scaling.mean.dtype, of_x.shape[1]
    fold = _fold(of_x)
    if fold > 1:
        of_x, of_dy = (view.reshape(-1, fold * channels) for view in (of_x, of_dy))
    mean = scaling.mean.repeat(fold)
    ones = torch.ones_like(mean)
    # Channels in front of pixels are added up in float64 anyway.
    size = _ROWS_A_SUM * fold * channels if of_x.dim() == 2 else of_x.numel()
    totals = []
    for part, cotangents in pieces(of_x, of_dy, size=size if dtype == x.dtype else _PIECE):
        _, deviations, outputs = torch.ops.aten.native_batch_norm_backward(
            *(cotangents.to(dtype), part.to(dtype), ones, mean, ones, mean, ones),
            train=False,
            eps=0.0,
            output_mask=[False, True, True],
        )
        totals.append(torch.cat([outputs, deviations]))
    # The pieces, and what is folded, in float64: they are few.
    total = torch.stack(totals).to(torch.float64).sum(0).view(2, fold, channels).sum(1)
    return CotangentSums(*total.to(dtype))


def _fold(view: Any) -> int:
    """Over how many sums to spread a channel of (rows, channels): a power of two, dividing them."""
    if view.dim() != 2:
        return 1
    rows, channels = view.shape
    fold = 1
    while rows % (2 * fold) == 0 and 2 * fold * channels <= _FREE_SUMS:
        fold *= 2
    return fold


def _gradient(
    dy: Any,
    x: Any,
    weights: Any | None,  # noqa: ARG001
    scaling: Scaling,
    correction: Correction,
) -> Any:
    slope, offset = -scaling.scale * correction.slope, -scaling.scale * correction.offset
    gradients = _linear(x, scaling.mean, slope, offset, scaling)
    return gradients.addcmul_(dy.to(gradients.dtype), scaling.scale).to(dy.dtype)


native = Kernel(_moments, _apply, _sums, _gradient)
