"""The repair of Keras's trainer on replicas and workers: the sole patch of Keras, reversible.

Importing this imports no framework, so that the catalogue of the repairs can be read where Keras is
broken or absent. `moving_statistics` and the repairs themselves do.
"""

from __future__ import annotations

from syncbn.multi_worker.catalogue import REPAIRS
from syncbn.multi_worker.repair import Repair
from syncbn.multi_worker.switch import MultiWorker, enable_multi_worker

__all__ = ["REPAIRS", "MultiWorker", "Repair", "enable_multi_worker"]
