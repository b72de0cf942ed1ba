"""A tensor as its memory lies: `(outer, channels, inner)`, or `(rows, channels)`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

__all__ = ["Layout", "pieces"]


class Layout(NamedTuple):
    """The order of the axes in memory, of a tensor that has its channels last by its shape.

    A convolution of Keras on torch returns channels that are last by the shape alone: in memory
    they are in front of the pixels, and a copy would cost as much as a pass.
    """

    order: tuple[int, ...]  # the axes of the tensor
    position: int  # of the channels among them
    shape: tuple[int, ...]  # in that order

    @classmethod
    def of(cls, x: Any) -> Layout:
        """The layout of x; of one with gaps in its memory, that of a copy.

        Args:
            x: at least two axes, the channels last.
        """
        order = tuple(range(x.dim()))
        if not x.is_contiguous():
            lying = tuple(sorted(order, key=lambda axis: -x.stride(axis)))
            order = lying if x.permute(lying).is_contiguous() else order
        return cls(order, order.index(x.dim() - 1), tuple(x.shape[axis] for axis in order))

    def view(self, x: Any) -> Any:
        """The tensor as (outer, channels, inner), where inner is 1 as (rows, channels)."""
        outer, (channels, *inner) = self.shape[: self.position], self.shape[self.position :]
        sizes = [math.prod(outer), channels]
        if inner:
            sizes.append(math.prod(inner))
        return x.permute(self.order).reshape(sizes)

    def restored(self, view: Any) -> Any:
        """The shape of the tensor back, of the same memory."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return view.view(self.shape).permute(back)

    def vector(self, vector: Any) -> Any:
        """A vector of the channels, for broadcasting against the view."""
        return vector if self.position == len(self.shape) - 1 else vector[:, None]


def pieces(*views: Any, size: int) -> list[tuple[torch.Tensor, ...]]:
    """The views in pieces of about so many elements, along the first axis."""
    first = views[0]
    rows = max(1, size * first.shape[0] // max(first.numel(), 1))
    return list(zip(*(view.split(rows) for view in views), strict=True))
