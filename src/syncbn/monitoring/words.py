"""What a monitor says at once, in words."""

from __future__ import annotations

from collections.abc import Sequence

from syncbn._backends.interface import Reading
from syncbn.monitoring.ledger import Parted
from syncbn.monitoring.statistics import FirstFault

__all__ = ["nan_in_words", "spread_in_words"]

_SHOWN = 10


def spread_in_words(parted: Sequence[Parted], replicas: int, step: int) -> str:
    """That moving statistics differ between replicas: where, by how much, and what to do."""
    lines = [
        f"layer {one.path}: {_of_replicas(one.replicas)} of {replicas} from replica 0, by "
        f"{one.spread:.2g} standard deviations"
        for one in parted[:_SHOWN]
    ]
    if len(parted) > _SHOWN:
        lines.append(f"and {len(parted) - _SHOWN} layers more, see SyncMonitor.report()")
    remedies = []
    if any(not one.synchronized for one in parted):
        remedies.append(
            "Plain BatchNormalization moves them by each replica's own batches: call "
            "syncbn.convert(model), or before saving syncbn.recalibrate(model, data)."
        )
    if any(one.synchronized for one in parted):
        remedies.append(
            "Synchronized layers part only where replicas take different steps, or load different "
            "weights: look there, and load one checkpoint on all of them."
        )
    return (
        "SyncMonitor requires the same moving statistics on every replica, for those of replica 0 "
        f"are saved. Received at training step {step}: {'; '.join(lines)}. {' '.join(remedies)}"
    )


def nan_in_words(
    reading: Reading,
    faults: Sequence[FirstFault],
    paths: Sequence[str],
    when: str,
    replicas: int,
) -> str:
    """Which layer and which replica first saw NaN or infinity, and where it may come from.

    Args:
        reading: that showed it.
        faults: every layer that has seen any, the first first.
        paths: of all layers.
        when: the step, in words.
        replicas: how many there are.
    """
    first = faults[0]
    said = (
        f"SyncMonitor: NaN or infinity first appears at {when}, in the statistics of layer "
        f"{paths[first.layer]}, number {first.call + 1} of {len(reading.calls)} calls in the order "
        f"of the step, {_where(reading, first, replicas)}."
    )
    behind = sum(fault.step == first.step for fault in faults[1:])
    if behind:
        said += f" {behind} layer{_s(behind)} after it too."
    if first.call == 0 and len(first.replicas) in (0, replicas):
        said += (
            " No batch normalization comes before it: look at the data, and at the weights of the "
            "layers before, which the gradients of the step before may have spoilt."
        )
    return said


def _where(reading: Reading, first: FirstFault, replicas: int) -> str:
    if reading.first_of_batch is None:
        return f"on {_of_replicas(first.replicas)} of {replicas}"
    for when, step in (("the batch", first.step), ("the batch before", first.step - 1)):
        own = [r for r, found in enumerate(reading.first_of_batch) if 0 < found == step]
        if own:
            return f"from {when}, which holds it on {_of_replicas(own)} of {replicas}"
    if replicas == 1:
        return "and not in the batch itself"
    return (
        "and not in the batch itself; which replica it began on is not known, for JAX computes "
        "the statistics of all of them at once"
    )


def _of_replicas(replicas: Sequence[int]) -> str:
    return f"replica{_s(len(replicas))} {', '.join(map(str, replicas))}"


def _s(number: int) -> str:
    return "" if number == 1 else "s"
