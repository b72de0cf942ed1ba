"""What `verify` found, as data: pure Python, so that reports are drawn without a framework."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Cause", "Comparison", "Finding", "Kind", "Layer", "Outcome", "Verdict"]


class Outcome(enum.Enum):
    """The answer in a word, and the exit code of `syncbn verify`."""

    AGREES = "agrees", 0
    DEPARTS = "departs", 1
    CANNOT_TELL = "cannot tell", 2

    def __init__(self, word: str, exit_code: int) -> None:
        self.word = word
        self.exit_code = exit_code


class Kind(enum.Enum):
    """What was compared."""

    INPUT = "data"  # the batch that the replicas were given together
    OUTPUT = "outputs"  # of a layer, those of all replicas one behind another
    NORMALIZATION = "normalization"  # of a layer, by float64 NumPy over its own inputs
    LOSS = "loss"
    GRADIENT = "gradients"
    WEIGHT = "weights"  # after the step
    STATISTIC = "moving statistics"  # after the step; states of layers in general
    SPREAD = "spread over replicas"  # of one variable; 0 where it is the same everywhere
    METRIC = "metrics"


class Cause(enum.Enum):
    """Why a model departs."""

    LOCAL = "local normalization"
    LOCAL_MASKED = "local normalization where the inputs have a mask"
    GROUPS = "normalization by groups"
    CANCELLATION = "variance lost to cancellation"
    EQUAL_WEIGHTS = "equal weights for parts of different sizes"
    OTHER_STATISTICS = "statistics that are not those of the global batch"
    RANDOM = "random numbers of each replica"
    BATCH_DEPENDENT = "a layer that looks at its replica's part alone"
    DATA = "other data than the global batch"
    LOSS_COUNT = "loss divided by the wrong count"
    LOSS = "another loss"
    GRADIENTS = "other gradients"
    NOT_SUMMED = "gradients that are not summed over the replicas"
    OPTIMIZER = "another step of the optimizer"
    METRIC = "a metric averaged wrongly"
    STATISTICS = "divergent moving statistics"
    NOT_FINITE = "NaN or infinity"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class Layer:
    """A layer in the order in which the step called it.

    Attributes:
        path: as `layer.path` of Keras, unique in the report.
        class_name: of its class, with `syncbn.` or `keras.` before it where it is theirs.
        depth: how many layers were called up to it, itself included.
        dtype: in which it computes.
        normalizes: whether it is a batch normalization.
    """

    path: str
    class_name: str
    depth: int
    dtype: str
    normalizes: bool = False


@dataclass(frozen=True)
class Comparison:
    """One thing compared in one step.

    Attributes:
        kind: what it is.
        name: of the variable or metric, or the path of the layer.
        layer: path of the layer that it belongs to; "" for the model as a whole.
        step: from 1.
        difference: largest absolute difference, relative to the largest absolute value of the
            reference; NaN where either is not finite.
        tolerance: what rounding alone may amount to, in the same unit.
    """

    kind: Kind
    name: str
    layer: str
    step: int
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference; NaN is explained by nothing."""
        return self.difference <= self.tolerance

    @property
    def excess(self) -> float:
        """How many times the tolerance the difference is."""
        if math.isnan(self.difference):
            return math.inf
        if self.tolerance == 0.0:
            return 0.0 if self.difference == 0.0 else math.inf
        return self.difference / self.tolerance


@dataclass(frozen=True)
class Finding:
    """A cause that was found, the first one first.

    Attributes:
        cause: which.
        layer: path of the layer; "" for the model as a whole.
        step: in which it was first seen, from 1.
        evidence: a sentence with the numbers that show it.
        remedy: a sentence that says what to do.
    """

    cause: Cause
    layer: str
    step: int
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """Whether replicas train as one device does, and where and why they do not.

    Attributes:
        outcome: the answer.
        summary: the same in one sentence.
        findings: causes, the first that departs first; empty where all agrees.
        layers: in the order of the calls.
        comparisons: everything that was compared.
        settings: what was run: model, backend, versions, devices, replicas, workers, steps, sizes
            of the batches and of their parts, precision, repairs; values that JSON can hold.
        tolerances: how they come about, a few sentences.
        notes: what else a reader has to know, such as what could not be compared.
    """

    outcome: Outcome
    summary: str
    findings: tuple[Finding, ...] = ()
    layers: tuple[Layer, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    tolerances: str = ""
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the replicas train as one device does."""
        return self.outcome is Outcome.AGREES

    @property
    def exit_code(self) -> int:
        """0 agrees, 1 departs, 2 cannot tell."""
        return self.outcome.exit_code

    def worst(self, kind: Kind, layer: str | None = None) -> Comparison | None:
        """The comparison of that kind, of that layer if given, that is furthest off.

        Args:
            kind: what is compared: outputs, gradients and so on.
            layer: its name; None for all of them.

        Returns:
            The one with the largest part of its tolerance; None where there is none.
        """
        of_kind = [
            one
            for one in self.comparisons
            if one.kind is kind and (layer is None or one.layer == layer)
        ]
        return max(of_kind, key=lambda one: one.excess, default=None)

    @property
    def first_departure(self) -> Comparison | None:
        """The comparison where it departs first: in the order of steps, and in one as it computes.

        That is data, outputs of layer after layer, loss, gradients from the last layer to the
        first, weights, moving statistics, metrics. Where there are findings, the first of these
        says at which layer and step to look.
        """
        departed = [one for one in self.comparisons if not one.agrees]
        places = {layer.path: number for number, layer in enumerate(self.layers)}
        if self.findings:
            found = self.findings[0]
            there = [one for one in departed if (one.layer, one.step) == (found.layer, found.step)]
            departed = there or departed

        def order(one: Comparison) -> tuple[int, int, int, float]:
            place = places.get(one.layer, len(places))
            backwards = one.kind is Kind.GRADIENT
            return one.step, _ORDER[one.kind], -place if backwards else place, -one.excess

        return min(departed, key=order, default=None)

    def __str__(self) -> str:
        """The report as plain text of 100 columns."""
        from syncbn.verification.text import as_text

        return as_text(self)


# A normalization is compared where its layer's outputs are.
_ORDER = {
    kind: number
    for number, kinds in enumerate(
        (
            (Kind.INPUT,),
            (Kind.OUTPUT, Kind.NORMALIZATION),
            (Kind.LOSS,),
            (Kind.GRADIENT,),
            (Kind.WEIGHT,),
            (Kind.STATISTIC, Kind.SPREAD),
            (Kind.METRIC,),
        )
    )
    for kind in kinds
}
