"""Why a step departs: what can be told from the numbers of one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from syncbn.verification.aligning import Parts, difference
from syncbn.verification.counts import (
    agrees_reweighted,
    common_ratio,
    is_count,
    mean_of_means,
    reweighted,
)
from syncbn.verification.measuring import Pair, Sharing
from syncbn.verification.normalizing import Departed, of_normalizations
from syncbn.verification.recording import LayerCall
from syncbn.verification.verdict import Cause, Comparison, Finding, Kind

__all__ = ["Evidence", "findings_of"]


class Evidence(NamedTuple):
    """One step and what was found out about it."""

    number: int
    pair: Pair
    comparisons: Sequence[Comparison]
    departed: Sequence[Departed]  # batch normalizations that are not those of the global batch
    repair: str | None  # what syncbn has for the training, where that was not in effect

    def failed(self, kind: Kind) -> list[Comparison]:
        """Those of that kind that rounding does not explain."""
        return [one for one in self.comparisons if one.kind is kind and not one.agrees]


def findings_of(evidence: Evidence) -> Iterator[Finding]:
    """The causes that this step shows, the first one first."""
    number, pair, parts = evidence.number, evidence.pair, evidence.pair.parts
    if evidence.failed(Kind.INPUT):
        yield Finding(
            Cause.DATA,
            "",
            number,
            f"The replicas were given {parts.words}.",
            "Give every replica its own part of one global batch: with Keras's fit, let it take "
            "the whole data set and share it out.",
        )
        return
    spread = [*_of_spread(evidence)]
    place = {call.key: order for order, call in enumerate(pair.structure.calls)}
    found = [*of_normalizations(number, evidence.departed)]
    first = min((place[one.key] for one in evidence.departed), default=len(place))
    outputs = sorted(evidence.failed(Kind.OUTPUT), key=lambda one: place[one.layer])
    if outputs and place[outputs[0].layer] < first:
        call = pair.structure.calls[place[outputs[0].layer]]
        found.insert(0, _of_output(evidence, outputs[0], call))
    elif not outputs and not found:
        found.extend(_behind_the_outputs(evidence, parts))
    # Where each replica goes its own way, gradients and metrics are its own, too.
    apart = any(one.cause is Cause.NOT_SUMMED for one in spread)
    yield from spread if apart and not outputs else [*found, *spread]


_REMEDY_RANDOM = (
    "Two devices cannot draw what one draws: this is to be known, not to be mended. The rest of "
    "this report has such layers in inference."
)
_FOR_TENSORFLOW = "syncbn.enable_multi_worker()"
_SAME_NUMBERS = (
    f" On TensorFlow Keras draws the same numbers on every replica, which {_FOR_TENSORFLOW} mends."
)


def _of_output(evidence: Evidence, one: Comparison, call: LayerCall) -> Finding:
    size = f"its outputs are off by {one.difference:.2g} of their largest, {_times(one)}"
    if not np.isfinite(one.difference):
        return Finding(
            Cause.NOT_FINITE,
            one.layer,
            one.step,
            "Its inputs agree, and its outputs are NaN, infinite or missing where they are not on "
            "one device.",
            "Look at what the layer does with a part of the batch; nan_check=True of "
            "SyncBatchNormalization names the replica.",
        )
    if call.random:
        return Finding(
            Cause.RANDOM,
            one.layer,
            one.step,
            f"It draws random numbers, its inputs agree, and {size}: replicas draw for themselves.",
            f"{_REMEDY_RANDOM}{_SAME_NUMBERS * (evidence.repair == _FOR_TENSORFLOW)}",
        )
    if call.normalization is not None or call.class_name.endswith("Normalization"):
        return Finding(
            Cause.OTHER_STATISTICS,
            one.layer,
            one.step,
            f"Its inputs agree, and {size}.",
            "Take syncbn.SyncBatchNormalization, or syncbn.convert(model).",
        )
    return Finding(
        Cause.BATCH_DEPENDENT,
        one.layer,
        one.step,
        f"Its inputs agree, and {size}: what it computes of an example depends on the other "
        "examples of its replica, or on the replica.",
        "Let its means and sums run over all replicas (tf.distribute's all_reduce, "
        "torch.distributed), by the number of elements.",
    )


def _behind_the_outputs(evidence: Evidence, parts: Parts) -> Iterator[Finding]:
    """All outputs agree: the loss, the gradients, the optimizer, the metrics."""
    if evidence.failed(Kind.LOSS):
        yield _of_loss(evidence, parts)
    elif evidence.failed(Kind.GRADIENT):
        yield _of_gradients(evidence, parts)
    elif evidence.failed(Kind.WEIGHT):
        yield _of_weights(evidence)
    elif evidence.failed(Kind.STATISTIC) and not evidence.failed(Kind.SPREAD):
        worst = max(evidence.failed(Kind.STATISTIC), key=lambda one: one.excess)
        yield Finding(
            Cause.STATISTICS,
            worst.layer,
            evidence.number,
            f"Its outputs agree, and {worst.name} is off by {worst.difference:.2g} after the step, "
            f"{_times(worst)}.",
            "Take syncbn.SyncBatchNormalization, whose moving statistics are those of the global "
            "batch.",
        )
    if not evidence.failed(Kind.LOSS):
        yield from _of_metrics(evidence, parts)


def _of_weights(evidence: Evidence) -> Finding:
    worst = max(evidence.failed(Kind.WEIGHT), key=lambda one: one.excess)
    off = f"{worst.name} is off by {worst.difference:.2g} after the step, {_times(worst)}"
    if not evidence.pair.own.gradients:
        return Finding(
            Cause.NOT_SUMMED,
            worst.layer,
            evidence.number,
            f"All outputs agree, no gradient went through an optimizer of the model, and {off}.",
            "Give the gradients to the model's optimizer, whose apply sums them over the replicas.",
        )
    return Finding(
        Cause.OPTIMIZER,
        worst.layer,
        evidence.number,
        f"The sum of the replicas' gradients agrees, and {off}: the optimizer makes another step "
        "of it, as where it clips or scales each replica's share by itself.",
        _repair("Clip and scale the sum of the gradients", evidence),
    )


def _of_loss(evidence: Evidence, parts: Parts) -> Finding:
    pair = evidence.pair
    expected = pair.total_loss(pair.reference, Sharing())
    own = pair.total_loss(pair.own, pair.sharing)
    assert expected is not None
    assert own is not None
    tolerance = evidence.failed(Kind.LOSS)[0].tolerance
    said = f"All outputs agree, and the loss is {own:.6g} where one device has {expected:.6g}"
    mended = reweighted(
        {replica: sum(losses) for replica, losses in pair.own.losses.items()}, parts
    )
    if mended is not None and difference(mended, expected) <= tolerance:
        return Finding(
            Cause.EQUAL_WEIGHTS,
            "",
            evidence.number,
            mean_of_means(said, parts),
            _repair("Divide the sum over all examples by their number", evidence),
        )
    ratio = own / expected if expected else float("nan")
    if is_count(ratio, parts, tolerance):
        return Finding(
            Cause.LOSS_COUNT,
            "",
            evidence.number,
            f"{said}: {ratio:.4g} times as much.",
            _repair("Divide the sum of the losses by the size of the global batch", evidence),
        )
    return Finding(
        Cause.LOSS,
        "",
        evidence.number,
        f"{said}.",
        _repair("Look at what compute_loss does with a part of the batch", evidence),
    )


def _of_gradients(evidence: Evidence, parts: Parts) -> Finding:
    pair = evidence.pair
    failed = evidence.failed(Kind.GRADIENT)
    worst, between = _first_backwards(evidence, failed)
    said = (
        f"All outputs{' and the loss' * bool(pair.own.losses)} agree, and {len(failed)} of "
        f"{len(pair.structure.trainable)} gradients do not"
    )
    if not np.isfinite(worst.difference):
        return Finding(
            Cause.NOT_FINITE,
            worst.layer,
            evidence.number,
            f"{said}; going backward {worst.name} is the first, NaN, infinite or missing on one "
            "side alone.",
            "Look for a share that overflows: in float16 a smaller loss scale, or bfloat16.",
        )
    ratio = common_ratio(pair)
    if ratio is not None and is_count(ratio, parts, worst.tolerance):
        return Finding(
            Cause.LOSS_COUNT,
            "",
            evidence.number,
            f"All outputs agree, and all gradients are {ratio:.4g} times those of one device.",
            _repair("Divide the sum of the losses by the size of the global batch", evidence),
        )
    if agrees_reweighted(pair, parts, failed):
        return Finding(
            Cause.EQUAL_WEIGHTS,
            "",
            evidence.number,
            mean_of_means(said, parts),
            _repair("Divide the sum over all examples by their number", evidence),
        )
    said = f"{said}; going backward the first is {worst.name}, off by {worst.difference:.2g}"
    if between:
        said += f", while those of {between[-1]} and behind it agree"
    local = [key for key in between if _normalizes(pair.structure.calls, key)]
    if local:
        return Finding(
            Cause.GRADIENTS,
            worst.layer,
            evidence.number,
            f"{said}. What lies between is the backward of {' and '.join(local)}: it takes sums "
            "over its own replica where its outputs took those over all.",
            "Take syncbn.SyncBatchNormalization, or sum over the replicas in the backward too.",
        )
    return Finding(
        Cause.GRADIENTS,
        worst.layer,
        evidence.number,
        f"{said}.",
        _repair(
            "Look at what happens to gradients before the optimizer, such as clipping", evidence
        ),
    )


def _normalizes(calls: Sequence[LayerCall], key: str) -> bool:
    return any(
        call.key == key and (call.normalization is not None or "Normalization" in call.class_name)
        for call in calls
    )


def _first_backwards(
    evidence: Evidence, failed: Sequence[Comparison]
) -> tuple[Comparison, list[str]]:
    """The gradient that departs first on the way back, and the calls up to where they agree.

    These are in the order of the calls, up to the nearest layer with weights whose gradients all
    agree; none where there is none behind.
    """
    calls = evidence.pair.structure.calls
    place = {call.key: order for order, call in enumerate(calls)}
    wrong = {one.layer for one in failed}
    first = max(failed, key=lambda one: (place.get(one.layer, -1), one.excess))
    start = place.get(first.layer, -1)
    behind = [
        place[one.layer]
        for one in evidence.comparisons
        if one.kind is Kind.GRADIENT
        and one.layer not in wrong
        and place.get(one.layer, -1) > start >= 0
    ]
    return first, [call.key for call in calls[start + 1 : min(behind) + 1]] if behind else []


def _of_spread(evidence: Evidence) -> Iterator[Finding]:
    """Copies of one variable that differ from replica to replica."""
    failed = evidence.failed(Kind.SPREAD)
    kinds = {one.path: one.kind for one in evidence.pair.structure.variables}
    weights = [one for one in failed if kinds[one.name] == "weight"]
    states = [one for one in failed if kinds[one.name] == "state"]
    if weights:
        worst = max(weights, key=lambda one: one.difference)
        yield Finding(
            Cause.NOT_SUMMED,
            worst.layer,
            evidence.number,
            f"After the step {len(weights)} weights are not the same on all replicas, {worst.name} "
            f"by {worst.difference:.2g}: each replica trains a model of its own.",
            "Let the optimizer have the sum of the gradients of all replicas: on torch call "
            "syncbn.average_gradients(model), or take DistributedDataParallel.",
        )
    if states:
        worst = max(states, key=lambda one: one.difference)
        yield Finding(
            Cause.STATISTICS,
            worst.layer,
            evidence.number,
            f"After the step {len(states)} moving statistics are not the same on all replicas, "
            f"{worst.name} by {worst.difference:.2g}; those of the first replica are what gets "
            "saved.",
            "Take syncbn.SyncBatchNormalization, whose moving statistics are the same bits on "
            "every replica, or syncbn.convert(model).",
        )


def _of_metrics(evidence: Evidence, parts: Parts) -> Iterator[Finding]:
    for one in evidence.failed(Kind.METRIC):
        own = evidence.pair.own.logs[one.name]
        expected = evidence.pair.reference.logs[one.name]
        yield Finding(
            Cause.METRIC,
            "",
            evidence.number,
            f"All outputs agree, and Keras reports {one.name} = {own:.6g} where one device has "
            f"{expected:.6g} (examples of each replica: {', '.join(map(str, parts.sizes))}).",
            _repair("Add up what the metric counts over all replicas before it divides", evidence),
        )


def _repair(what: str, evidence: Evidence) -> str:
    # What syncbn has for JAX and torch is no repair of what Keras computes.
    if evidence.repair != _FOR_TENSORFLOW:
        return f"{what}."
    return f"{what}; Keras's own fit does so with {evidence.repair} (--repair)."


def _times(one: Comparison) -> str:
    return f"{one.excess:.2g} times what rounding explains"
