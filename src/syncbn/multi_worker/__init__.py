"""The repair of Keras's trainer on replicas and workers: the sole patch of Keras, reversible."""

from __future__ import annotations

from syncbn.multi_worker.catalogue import REPAIRS
from syncbn.multi_worker.moving_statistics import average_moving_statistics
from syncbn.multi_worker.repair import Repair
from syncbn.multi_worker.switch import MultiWorker, enable_multi_worker

__all__ = [
    "REPAIRS",
    "MultiWorker",
    "Repair",
    "average_moving_statistics",
    "enable_multi_worker",
]
