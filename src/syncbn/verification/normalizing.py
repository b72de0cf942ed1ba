"""Batch normalizations that did not normalize by the global batch, and by what they did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from syncbn.verification.aligning import Parts
from syncbn.verification.measuring import Pair
from syncbn.verification.normalization import Normalization, by_the_global_batch, hypotheses
from syncbn.verification.normalizations import normalizations
from syncbn.verification.recording import LayerCall
from syncbn.verification.tolerances import Tolerances
from syncbn.verification.verdict import Cause, Comparison, Finding, Kind

__all__ = ["Departed", "compared", "of_normalizations"]

# |mean| / deviation from where on a variance that is off is one of cancellation.
_LARGE_MEAN = 30.0


class Departed(NamedTuple):
    """A batch normalization whose outputs are not those by the global batch.

    Attributes:
        key: of its call on one device.
        call: what the layer is.
        layer: what it did.
        comparison: with float64 NumPy.
        by: the statistics that explain its outputs; "" for none.
    """

    key: str
    call: LayerCall
    layer: Normalization
    comparison: Comparison
    by: str


def compared(
    number: int, pair: Pair, parts: Parts, tolerances: Tolerances
) -> Iterator[tuple[Comparison, Departed | None]]:
    """Each batch normalization of a step against NumPy."""
    keys = dict(zip(pair.own_structure.keys, pair.structure.keys, strict=True))
    for call, layer in normalizations(pair.own_structure, pair.own, parts, pair.sharing):
        key = keys[call.key]
        tolerance = tolerances.of_normalization(call.dtype, layer.conditioning())
        gap = layer.difference(by_the_global_batch(layer))
        comparison = Comparison(Kind.NORMALIZATION, key, key, number, gap, tolerance)
        if comparison.agrees:
            yield comparison, None
            continue
        gaps = {
            name: _or_infinite(layer.difference(statistics))
            for name, statistics in hypotheses(layer).items()
        }
        by = min(gaps, key=lambda name: gaps[name])
        explained = gaps[by] <= max(tolerance, 1e-2 * gap)
        yield comparison, Departed(key, call, layer, comparison, by if explained else "")


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def of_normalizations(number: int, departed: Sequence[Departed]) -> Iterator[Finding]:
    """A finding for each cause, at the first layer that has it."""
    by_cause: dict[Cause, list[Departed]] = {}
    for one in departed:
        by_cause.setdefault(_cause(one), []).append(one)
    for cause, layers in by_cause.items():
        first = layers[0]
        others = ""
        if len(layers) > 1:
            names = ", ".join(one.key for one in layers[1:4])
            others = f" {len(layers) - 1} more likewise: {names}{', …' * (len(layers) > 4)}."
        yield Finding(
            cause, first.key, number, _evidence(cause, first) + others, _remedy(cause, first)
        )


def _cause(one: Departed) -> Cause:
    if one.by.startswith("local"):
        return Cause.LOCAL_MASKED if one.layer.has_mask else Cause.LOCAL
    if one.by == "groups":
        return Cause.GROUPS
    if one.by.startswith("equal weights"):
        return Cause.EQUAL_WEIGHTS
    if one.layer.conditioning() >= _LARGE_MEAN:
        return Cause.CANCELLATION
    return Cause.OTHER_STATISTICS


def _evidence(cause: Cause, one: Departed) -> str:
    layer = one.layer
    means = {r: layer.moments([r]).mean for r in layer.parts}
    whole = layer.moments(list(layer.parts))
    deviation = np.sqrt(whole.variance(np) + layer.epsilon)
    off = {r: float(np.max(np.abs(mean - whole.mean) / deviation)) for r, mean in means.items()}
    furthest = max(off, key=lambda r: off[r])
    size = f"Its outputs are off by {one.comparison.difference:.2g} of their largest"
    if cause in {Cause.LOCAL, Cause.LOCAL_MASKED, Cause.GROUPS}:
        of = "its group's" if cause is Cause.GROUPS else "its own"
        return (
            f"{size}, and are those by {of} statistics on each replica: replica {furthest}'s mean "
            f"lies {off[furthest]:.2g} standard deviations from that of the global batch."
        )
    if cause is Cause.EQUAL_WEIGHTS:
        sizes = ", ".join(f"{counts.sum():.6g}" for _, counts in sorted(layer.counts.items()))
        return (
            f"{size}, and are those by the mean of the replicas' statistics, with equal weights "
            f"for {sizes} elements."
        )
    if cause is Cause.CANCELLATION:
        used = layer.used_variance()
        said = "" if used is None else f" It used the variance {used[0]:.3g} for {used[1]:.3g}."
        return (
            f"{size}.{said} The mean is up to {layer.conditioning():.2g} standard deviations, "
            "where E[x²] − E[x]² loses its digits."
        )
    if one.by == "without the mask":
        return f"{size}, and are those by all elements, masked ones too."
    return f"{size}, and are by neither the global batch's statistics nor its replica's."


def _remedy(cause: Cause, one: Departed) -> str:
    normalization = one.call.normalization or {}
    take = "Take syncbn.SyncBatchNormalization in its place: syncbn.convert(model)."
    if cause is Cause.GROUPS:
        return "It was asked to: leave out group_size and group_assignment for the global batch."
    if normalization.get("group_size") == 1:
        return "It was asked to: leave out group_size=1 for the global batch."
    if cause is Cause.LOCAL_MASKED and normalization.get("synchronized"):
        return f"Keras's synchronized=True does not synchronize where inputs have a mask. {take}"
    if cause is Cause.CANCELLATION:
        return f"Subtract a constant of the size of the mean before the layer, or: {take}"
    return take
