"""What the layer hands to a backend, whatever the framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from syncbn.groups import Grouping
from syncbn.moments import Moments

__all__ = ["Activation", "Batch", "KeptOutput", "Reading", "Scheme"]

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
    # Told the moments of this replica's own part, which the monitor keeps; on TensorFlow and torch.
    watch: Callable[[Moments], None] | None = None


class Reading(NamedTuple):
    """What the replicas of a model saw in one step, for the monitor: R rows, the same everywhere.

    The channels of all calls of layers stand one after another, T in all, in the order of the
    calls; those of all layers, M in all, in the order of the layers.
    """

    step: int  # training steps until then
    calls: tuple[int, ...]  # of which layer each call was, by its number
    count: Any  # shape (R, T): elements of a channel; -1 where the replica did not look
    mean: Any  # shape (R, T)
    m2: Any  # shape (R, T)
    moving_mean: Any  # shape (R, M)
    moving_variance: Any  # shape (R, M)
    # Shape (R, calls): the first step whose statistics were NaN or infinite there, 0 for none.
    first: Any
    # Shape (R,): the same of the batch itself; None where `first` tells the replicas apart.
    first_of_batch: Any | None = None
