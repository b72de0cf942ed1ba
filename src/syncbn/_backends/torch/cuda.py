"""Passes by the kernels of `torch.nn.SyncBatchNorm`, which exist on CUDA alone.

They run at the speed of memory. What they are given are our vectors in place of theirs: what is
exchanged between the two passes each way is our own. No part of this has run on a GPU: the tests
replace the four operations by their definitions.
"""

from __future__ import annotations

from typing import Any

import torch

from syncbn._backends.torch.layout import Layout
from syncbn._backends.torch.scaling import Correction, CotangentSums, Kernel, Scaling
from syncbn.moments import Moments

__all__ = ["cuda"]


def _moments(x: Any, weights: Any | None, dtype: Any) -> Moments:  # noqa: ARG001
    view = _of(x)[1]
    # With epsilon 0 the second is 1 / √variance, and 0 for a variance of 0.
    mean, inverse = torch.batch_norm_stats(view, 0.0)
    count = torch.full((), view.numel() // view.shape[1], dtype=dtype, device=x.device)
    inverse = inverse.to(dtype)
    variance = torch.where(inverse > 0, inverse.square().reciprocal(), 0.0)
    return Moments(count, mean.to(dtype), variance * count)


def _apply(x: Any, scaling: Scaling) -> Any:
    layout, view = _of(x)
    ones = torch.ones_like(scaling.mean)
    # (x − mean) · inverse · weight + bias
    outputs = torch.batch_norm_elemt(view, scaling.scale, scaling.offset, scaling.mean, ones, 0.0)
    return layout.restored(outputs)


def _sums(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> CotangentSums:  # noqa: ARG001
    layout, view = _of(x)
    ones = torch.ones_like(scaling.mean)
    outputs, deviations, _, _ = torch.batch_norm_backward_reduce(
        *(_as(layout, dy, view), view, scaling.mean, ones, ones), True, False, False
    )
    return CotangentSums(outputs, deviations)


def _gradient(
    dy: Any,
    x: Any,
    weights: Any | None,  # noqa: ARG001
    scaling: Scaling,
    correction: Correction,
) -> Any:
    layout, view = _of(x)
    ones = torch.ones_like(scaling.mean)
    # What it divides by the count: ours is divided already, so the count is 1.
    count = torch.ones(1, dtype=torch.int32, device=x.device)
    # (dy − offset / count − (x − mean) · inverse² · slope / count) · inverse · weight
    gradients = torch.batch_norm_backward_elemt(
        *(_as(layout, dy, view), view, scaling.mean, ones, scaling.scale),
        *(correction.offset, correction.slope, count),
    )
    return layout.restored(gradients)


def _of(x: Any) -> tuple[Layout, Any]:
    layout = Layout.of(x)
    return layout, layout.view(x).contiguous()


def _as(layout: Layout, dy: Any, view: Any) -> Any:
    """The cotangent of the same memory order and dtype as the view."""
    return layout.view(dy).to(view.dtype).contiguous()


cuda = Kernel(_moments, _apply, _sums, _gradient)
