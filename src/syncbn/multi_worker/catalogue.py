"""The repairs as data: read without Keras, printed by the documentation and by diagnosis."""

from __future__ import annotations

from syncbn.multi_worker.repair import Repair

__all__ = ["REPAIRS"]

REPAIRS: tuple[Repair, ...] = ()
