"""The repairs as data: read without Keras, printed by the documentation and by diagnosis."""

from __future__ import annotations

from syncbn.multi_worker.repair import Repair

__all__ = ["REPAIRS"]

_HERE = "syncbn.multi_worker.repairs"
_NONE_KNOWN = "none known"

REPAIRS: tuple[Repair, ...] = (
    Repair(
        "building",
        "fit and evaluate on several workers crash; generators lose batches",
        "https://github.com/keras-team/keras/issues/20585",
        f"{_HERE}.building",
    ),
    Repair(
        "steps",
        "steps_per_execution > 1 crashes; logs are means of means; XLA fails late",
        "https://github.com/keras-team/keras/issues/20585",
        f"{_HERE}.steps",
    ),
    Repair(
        "loss",
        "the loss of parts that are unequal, masked or weighted is a mean of means",
        _NONE_KNOWN,
        f"{_HERE}.loss",
    ),
)
