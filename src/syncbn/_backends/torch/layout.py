"""A tensor as its memory lies: `(outer, channels, inner)`, or `(rows, channels)`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

__all__ = ["Layout", "pieces"]


class Layout(NamedTuple):
    """Where in memory the channels are, of a tensor that has them last by its shape.

    A convolution of Keras on torch returns channels that are last by the shape alone: in memory
    they are in front of the pixels, and a copy would cost as much as a pass.
    """

    position: int  # of the channels among the axes in the order of memory
    shape: tuple[int, ...]  # in that order

    @classmethod
    def of(cls, x: Any) -> Layout:
        """The layout of x; of one that has no order, or another, that of a copy with channels last.

        Args:
            x: at least one axis, the channels last.
        """
        positions = range(x.dim() - 1, -1, -1)
        lying = (p for p in positions if x.movedim(-1, p).is_contiguous())
        position = next(lying, x.dim() - 1)
        return cls(position, tuple(x.movedim(-1, position).shape))

    def view(self, x: Any) -> Any:
        """The tensor as (outer, channels, inner), where inner is 1 as (rows, channels)."""
        outer, (channels, *inner) = self.shape[: self.position], self.shape[self.position :]
        sizes = [math.prod(outer), channels]
        if inner:
            sizes.append(math.prod(inner))
        return x.movedim(-1, self.position).reshape(sizes)

    def restored(self, view: Any) -> Any:
        """The shape of the tensor back, of the same memory."""
        return view.view(self.shape).movedim(self.position, -1)

    def vector(self, vector: Any) -> Any:
        """A vector of the channels, for broadcasting against the view."""
        return vector if self.position == len(self.shape) - 1 else vector[:, None]


def pieces(*views: Any, size: int) -> list[tuple[torch.Tensor, ...]]:
    """The views in pieces of about so many elements, along the first axis."""
    first = views[0]
    rows = max(1, size * first.shape[0] // max(first.numel(), 1))
    return list(zip(*(view.split(rows) for view in views), strict=True))
