"""How far a step on replicas is from the same step on one device, quantity by quantity."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from syncbn.verification.aligning import Parts, difference, gathered, parts_of, scale_of
from syncbn.verification.recording import Step, Structure
from syncbn.verification.verdict import Kind

__all__ = ["Measured", "Pair", "Sharing", "measure"]


# Of the largest gradient, what sums that cancel may leave: 16 roundings.
_NOTHING = {"bfloat16": 16 * 2.0**-7, "float16": 16 * 2.0**-10}


class Sharing(NamedTuple):
    """What the results of several replicas are to each other, which depends on the backend.

    Attributes:
        replicas: how many there are.
        shared: one process computes for all of them at once, on arrays laid out over them: JAX.
        summed_losses: losses are shares, whose sum is that of the batch. Else they are means over
            a replica's examples.
        summed_gradients: likewise what the optimizer is given. Else it is that of the batch.
    """

    replicas: int = 1
    shared: bool = False
    summed_losses: bool = True
    summed_gradients: bool = True


class Measured(NamedTuple):
    """A difference, still without a tolerance of its own."""

    kind: Kind
    name: str
    layer: str
    difference: float
    # Of weights, the part of the tolerance that comes from the gradient's.
    allowance: float = 0.0


@dataclass(frozen=True)
class Pair:
    """A step on one device, and the same on replicas or with other roundings."""

    structure: Structure  # of the first
    before: Sequence[Any]  # all variables before the step
    reference: Step
    own_structure: Structure
    own: Step
    sharing: Sharing
    gradient_tolerance: Mapping[str, float]  # relative to the largest gradient of the variable

    @functools.cached_property
    def parts(self) -> Parts:
        """Who held which examples."""
        return parts_of(
            self.reference.data.get(0, []),
            self.own.data,
            self.sharing.replicas,
            self.sharing.shared,
        )

    def total_loss(self, step: Step, sharing: Sharing) -> float | None:
        """The loss of the global batch, as the replicas have it."""
        of_replicas = {replica: sum(losses) for replica, losses in step.losses.items()}
        if not of_replicas:
            return None
        if sharing.shared or sharing.replicas == 1:
            return of_replicas[0]
        if sharing.summed_losses:
            return sum(of_replicas.values())
        rows = self.parts.rows
        # An empty part has no mean.
        means = {replica: loss for replica, loss in of_replicas.items() if len(rows[replica])}
        weights = [len(rows[replica]) for replica in means]
        return float(np.average(list(means.values()), weights=weights)) if means else None

    def total_gradient(self, number: int) -> Any | None:
        """The gradient that the optimizer applies to that trainable variable."""
        found = [of_replica.get(number) for _, of_replica in sorted(self.own.gradients.items())]
        there = [gradient for gradient in found if gradient is not None]
        if not there:
            return None
        if self.sharing.shared or not self.sharing.summed_gradients:
            return there[0]
        return np.sum([np.asarray(one, np.float64) for one in there], axis=0)


def measure(pair: Pair) -> list[Measured]:
    """Every difference of the step."""
    parts = pair.parts
    return [
        Measured(Kind.INPUT, "batch", "", 0.0 if parts.complete else float("nan")),
        *_outputs(pair, parts),
        *_loss(pair),
        *_gradients(pair),
        *_variables(pair),
        *_spread(pair),
        *_metrics(pair),
    ]


def _outputs(pair: Pair, parts: Parts) -> Iterator[Measured]:
    if not parts.complete:
        return
    own_keys = pair.own_structure.keys
    for key, own_key in zip(pair.structure.keys, own_keys, strict=True):
        reference = pair.reference.outputs.get((key, 0))
        if reference is None:
            continue
        gaps = []
        for position, expected in enumerate(reference):
            values = {
                replica: outputs[position]
                for (name, replica), outputs in pair.own.outputs.items()
                if name == own_key and position < len(outputs)
            }
            whole = gathered(values, parts, expected, pair.sharing.shared)
            if whole is not None:
                gaps.append(difference(whole, expected))
        if gaps:
            yield Measured(Kind.OUTPUT, key, key, float(np.max(gaps)))


def _loss(pair: Pair) -> Iterator[Measured]:
    expected = pair.total_loss(pair.reference, Sharing())
    own = pair.total_loss(pair.own, pair.sharing)
    if expected is not None and own is not None:
        yield Measured(Kind.LOSS, "loss", "", difference(own, expected))


_SMALL = 0.1


def gradient_scale(pair: Pair, number: int) -> float:
    """What a gradient's difference is relative to.

    Its largest value; for one that is small beside the others a tenth of theirs, or what short
    dtypes leave of nothing. It may be a sum that cancels, as that of a bias in front of batch
    normalization, which is 0 but for rounding, or of the last bias. What is wrong by itself is
    wrong by ten thousand times the tolerance, and still seen.
    """
    floor = max([_SMALL, *(_NOTHING.get(call.dtype, 0.0) for call in pair.structure.calls)])
    largest = [scale_of(gradient) for gradient in pair.reference.gradients.get(0, {}).values()]
    own = np.abs(np.asarray(pair.reference.gradients[0][number], np.float64)).max(initial=0.0)
    return float(max(own, floor * max(largest))) if np.isfinite(own) else 1.0


def _gradients(pair: Pair) -> Iterator[Measured]:
    for number, expected in sorted(pair.reference.gradients.get(0, {}).items()):
        own = pair.total_gradient(number)
        variable = pair.structure.trainable[number]
        if own is None:
            yield Measured(Kind.GRADIENT, variable.path, variable.layer, float("nan"))
            continue
        gap = difference(own, expected) * scale_of(expected) / gradient_scale(pair, number)
        yield Measured(Kind.GRADIENT, variable.path, variable.layer, gap)


def _variables(pair: Pair) -> Iterator[Measured]:
    after = pair.own.after[min(pair.own.after)]
    expected = pair.reference.after[0]
    number = -1
    largest = _largest_step(pair)
    for place, variable in enumerate(pair.structure.compared):
        number += variable.trainable
        if variable.kind == "state":
            gap = difference(after[place], expected[place]) * scale_of(expected[place])
            gap /= state_scale(pair, place)
            yield Measured(Kind.STATISTIC, variable.path, variable.layer, gap)
        elif variable.kind == "weight":
            found = _weight(pair, place, number, after[place], largest)
            if found is not None:
                yield Measured(Kind.WEIGHT, variable.path, variable.layer, *found)


def state_scale(pair: Pair, place: int) -> float:
    """What a state's difference is relative to.

    Its largest value; for one that is next to nothing beside the others of its layer a thousandth
    of theirs, as a moving mean of inputs whose mean is 0 but for rounding.
    """
    layer = pair.structure.compared[place].layer
    values = [
        float(np.max(np.abs(np.asarray(value, np.float64)), initial=0.0))
        for number, (variable, value) in enumerate(
            zip(pair.structure.compared, pair.reference.after[0], strict=True)
        )
        if variable.kind == "state" and (number == place or (layer and variable.layer == layer))
    ]
    own = float(np.max(np.abs(np.asarray(pair.reference.after[0][place], np.float64)), initial=0.0))
    scale = max(own, 1e-3 * max(values))
    return scale if np.isfinite(scale) and scale else 1.0


def _largest_step(pair: Pair) -> float:
    """Of any weight on one device."""
    steps = [
        np.abs(np.asarray(after, np.float64) - np.asarray(before, np.float64))
        for variable, before, after in zip(
            pair.structure.compared, pair.before, pair.reference.after[0], strict=False
        )
        if variable.kind == "weight"
    ]
    return max((float(step.max(initial=0.0)) for step in steps), default=0.0)


def _weight(
    pair: Pair, place: int, number: int, own: Any, largest: float
) -> tuple[float, float] | None:
    """The difference of the element that is furthest beyond what its gradient allows, and that.

    An optimizer such as Adam makes a full step of a gradient that is 0 but for rounding, to either
    side. With δ the tolerance of a gradient g, its step may be off by the share 2 δ / |g|. Elements
    where that is 1 or more are left out, unless they are off by more than twice the largest step of
    any weight; None if all of them are.
    """
    expected = np.asarray(pair.reference.after[0][place], np.float64)
    step = np.abs(expected - np.asarray(pair.before[place], np.float64))
    gap = np.abs(np.asarray(own, np.float64) - expected)
    if not (np.all(np.isfinite(gap)) and gap.size):
        return difference(own, expected), 0.0
    scale = scale_of(expected)
    gradient = pair.reference.gradients.get(0, {}).get(number)
    if gradient is None:
        return float(gap.max()) / scale, 0.0
    path = pair.structure.compared[place].path
    delta = pair.gradient_tolerance.get(path, 0.0) * gradient_scale(pair, number)
    gradient = np.abs(np.asarray(gradient, np.float64))
    share = np.minimum(1.0, 2 * delta / np.maximum(gradient, 1e-300))
    allowed = np.where(share < 1, share * step, 2 * largest)
    counts = (share < 1) | (gap > allowed)
    if not np.any(counts):
        return None
    gap = np.where(counts, gap, 0.0)
    allowed = np.where(counts, allowed, np.inf)
    worst = np.unravel_index(np.argmax(gap - allowed), gap.shape)
    return float(gap[worst]) / scale, float(allowed[worst]) / scale


def _spread(pair: Pair) -> Iterator[Measured]:
    """How far the copies of one variable are from each other."""
    copies = [values for _, values in sorted(pair.own.after.items())]
    for place, variable in enumerate(pair.structure.compared):
        if variable.kind not in {"weight", "state"} or len(copies) < 2:
            continue
        first = copies[0][place]
        gap = max(difference(copy[place], first) for copy in copies[1:])
        yield Measured(Kind.SPREAD, variable.path, variable.layer, gap)


def _metrics(pair: Pair) -> Iterator[Measured]:
    for name, expected in pair.reference.logs.items():
        if name in pair.own.logs:
            yield Measured(Kind.METRIC, name, "", difference(pair.own.logs[name], expected))
