"""Passes on a CPU by torch's own batch normalization, each of its kernels for what it is best at.

What costs time is memory that is written: the kernel of the gradient takes 2 ms for its two sums
alone and 8 with the tensor beside them, which is not yet the gradient. And each operation starts
and ends together on all cores, so few large ones are better than many small ones: on a busy machine
each waits for the slowest.
"""

from __future__ import annotations

from typing import Any

import torch

from syncbn._backends.torch.composed import with_few_digits
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

# Elements of a piece, where what is between two operations is as large as x: 16 MB of float32.
_PIECE = 2**22

# In standard deviations: up to here `x · scale + (offset − mean · scale)`, as torch's kernel has
# it, is as good as `(x − mean) · scale + offset`.
_LARGE_MEAN = 4.0

# Rows that are added up in one float32 number: a million lose four digits, 8192 lose one.
_ROWS_A_SUM = 1024

# Sums that run side by side at no cost: with few channels, more of them for each.
_FREE_SUMS = 512

# More of them for that kernel, whose sums are plain ones; torch's own add up in a cascade.
_SHORT_SUMS = 2048


def _moments(x: Any, weights: Any | None, dtype: Any) -> Moments:  # noqa: ARG001
    """Moments in two passes: first the mean, then the deviations from it."""
    view, wide = Layout.of(x).view(x), statistics_dtype(x.dtype)
    count = torch.tensor(view.numel() // view.shape[1], dtype=dtype)
    divisor = as_divisor(count, xp)
    folded = _folded(view, sums=_FREE_SUMS)
    totals = [
        _unfolded(piece.to(wide).sum(_dims(piece)), fold)
        for (part,), fold in folded
        # All at once, but where a conversion needs memory.
        for (piece,) in ([(part,)] if part.dtype == wide else pieces(part, size=_PIECE))
    ]
    rough = with_few_digits((_added(totals) / divisor).to(wide))
    sums = []
    for (part,), fold in folded:
        pivot = rough.repeat(fold) if part.dim() == 2 else rough[:, None]
        for (piece,) in pieces(part, size=_PIECE):
            deviations = piece - pivot
            rest = deviations.sum(_dims(piece))
            sums.append(
                _unfolded(torch.stack([rest, deviations.square_().sum(_dims(piece))]), fold)
            )
    # What the rough mean lacks, and what that has added to the squares.
    rest, squares = _added(sums)
    rest = rest / divisor
    m2 = torch.clamp(squares - count * rest * rest, min=0)
    return Moments(count, (rough + rest).to(dtype), m2.to(dtype))


def _folded(*views: Any, sums: int) -> list[tuple[tuple[Any, ...], int]]:
    """Rows side by side, so that no sum is long, and the last few by themselves; with how many.

    Channels in front of pixels are left as they are: there torch adds up in float64.
    """
    if views[0].dim() == 3:
        return [(views, 1)]
    rows, channels = views[0].shape
    fold = max(1, min(sums // channels, rows))
    whole = rows - rows % fold
    parts = [(tuple(view[:whole].reshape(-1, fold * channels) for view in views), fold)]
    if whole < rows:
        parts.append((tuple(view[whole:] for view in views), 1))
    return parts


def _unfolded(sums: Any, fold: int) -> Any:
    """Sums of what is folded, shape (…, fold · C), as those of the channels, in float64."""
    wide = sums.to(torch.float64)
    return wide if fold == 1 else wide.view(*sums.shape[:-1], fold, -1).sum(-2)


def _added(totals: list[Any]) -> Any:
    return totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)


def _dims(view: Any) -> tuple[int, ...]:
    """All axes but the channels'."""
    return (0,) if view.dim() == 2 else (0, 2)


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
    layout, dtype = Layout.of(x), scaling.mean.dtype
    totals = []
    for (of_dy, of_x), fold in _folded(layout.view(dy), layout.view(x), sums=_SHORT_SUMS):
        mean = scaling.mean.repeat(fold)
        ones = torch.ones_like(mean)
        size = _ROWS_A_SUM * len(mean) if of_x.dim() == 2 else of_x.numel()
        size = size if x.dtype == dtype else min(size, _PIECE)
        for cotangents, piece in pieces(of_dy, of_x, size=size):
            _, deviations, outputs = torch.ops.aten.native_batch_norm_backward(
                *(cotangents.to(dtype), piece.to(dtype), ones, mean, ones, mean, ones),
                train=False,
                eps=0.0,
                output_mask=[False, True, True],
            )
            totals.append(_unfolded(torch.stack([outputs, deviations]), fold))
    return CotangentSums(*_added(totals).to(dtype))


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
