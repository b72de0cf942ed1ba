"""What the layer hands to a backend, whatever the framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from syncbn.groups import Grouping

__all__ = ["Activation", "Batch", "KeptOutput", "Scheme"]

Activation = Callable[[Any], Any]


class Batch(NamedTuple):
    """This replica's part of the global batch, and the layer's variables."""

    inputs: Any  # any rank; floating point
    axis: int  # that of the channels
    # Of the inputs' rank, each axis of its size or 1. Of a floating point dtype, not negative,
    # constants for the gradient; None where every element counts 1.
    weights: Any | None
    state: Mapping[str, Any]  # the layer's variables, each of shape (C,), by name


class KeptOutput(NamedTuple):
    """That the backward is to find all it needs in the output."""

    layer: str  # its name, for the error where it cannot
    negative_slope: float  # of the activation below 0, which above 0 changes nothing; 1 for none


class Scheme(NamedTuple):
    """How to normalize: the same on every replica."""

    epsilon: float  # added to the variance
    grouping: Grouping = Grouping()
    virtual_batch_size: int | None = None  # examples of a replica that normalize by themselves
    activation: Activation | None = None  # applied to the outputs; keeps their shape
    checked_layer: str | None = None  # its name, where NaN is to be looked for
    kept_output: KeptOutput | None = None  # None for a backward that keeps the input
    axis_name: str | tuple[str, ...] | None = None  # JAX: of the mapped axes to sum over
    process_group: Any = None  # torch: of torch.distributed; None for the default one
