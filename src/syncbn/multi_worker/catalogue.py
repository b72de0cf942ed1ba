"""The repairs as data: read without Keras, printed by the documentation and by diagnosis."""

from __future__ import annotations

from syncbn.multi_worker.repair import Repair

__all__ = ["REPAIRS"]

_MODULES = "syncbn.multi_worker.repairs."

REPAIRS: tuple[Repair, ...] = (
    Repair(
        name="named-timeouts",
        mends="collectives wait for ever for a worker that is gone, and do not say for which",
        issue="https://github.com/keras-team/keras/issues/20585",
        module=_MODULES + "named_timeouts",
    ),
    Repair(
        name="in-step",
        mends="what one worker does alone, or stops alone, leaves the others waiting",
        issue="https://github.com/keras-team/keras/issues/20585",
        module=_MODULES + "in_step",
    ),
    Repair(
        name="chief-writes",
        mends="callbacks write the same files on every worker, and half of them when killed",
        issue="https://github.com/keras-team/keras/issues/20585",
        module=_MODULES + "chief_writes",
    ),
)
