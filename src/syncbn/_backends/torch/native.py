"""Passes on a CPU, a piece of the tensor at a time that stays in the cache.

Each operation of torch alone reads and writes all of its tensors in memory, and what it writes is
new memory that the system has to find first: that is most of the time. Here what is between two
operations never leaves the cache, and a pass costs what its tensors cost to read and write once.
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

# Elements of a piece: a megabyte of float32. Half and twice of it are as fast.
_PIECE = 2**18

# Rows that torch's kernel for the gradient adds up in one float32 number: a million would lose four
# digits.
_ROWS_A_SUM = 8192

# Sums that run side by side at no cost: with few channels, more of them for each.
_FREE_SUMS = 256


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
    layout = Layout.of(x)
    view = layout.view(x)
    mean, scale, offset = map(layout.vector, (scaling.mean, scaling.scale, scaling.offset))
    outputs = torch.empty_like(view)
    for part, into in pieces(view, outputs, size=_PIECE):
        if part.dtype == mean.dtype:
            torch.sub(part, mean, out=into).mul_(scale).add_(offset)
        else:
            into.copy_((part - mean).mul_(scale).add_(offset))
    return layout.restored(outputs)


def _sums(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> CotangentSums:  # noqa: ARG001
    layout = Layout.of(x)
    of_x, of_dy = layout.view(x), layout.view(dy)
    dtype, channels = scaling.mean.dtype, of_x.shape[1]
    fold = _fold(of_x)
    if fold > 1:
        of_x, of_dy = (view.reshape(-1, fold * channels) for view in (of_x, of_dy))
    mean = scaling.mean.repeat(fold)
    ones = torch.ones_like(mean)
    size = min(_PIECE, _ROWS_A_SUM * fold * channels) if of_x.dim() == 2 else _PIECE
    totals = []
    for part, cotangents in pieces(of_x, of_dy, size=size):
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
    layout = Layout.of(x)
    view = layout.view(x)
    gradients = torch.empty_like(view)
    mean, scale, slope, offset = map(
        layout.vector,
        (
            scaling.mean,
            scaling.scale,
            -scaling.scale * correction.slope,
            -scaling.scale * correction.offset,
        ),
    )
    for part, cotangents, into in pieces(view, layout.view(dy), gradients, size=_PIECE):
        terms = (part - mean).mul_(slope).add_(offset)
        if into.dtype == terms.dtype == cotangents.dtype:
            torch.addcmul(terms, cotangents, scale, out=into)
        else:
            into.copy_(terms.addcmul_(cotangents.to(terms.dtype), scale))
    return layout.restored(gradients)


native = Kernel(_moments, _apply, _sums, _gradient)
