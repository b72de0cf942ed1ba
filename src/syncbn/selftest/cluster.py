"""The cluster that this process is a worker of: its strategy, what all say, and how to leave it."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

__all__ = ["Cluster"]


class Cluster:
    """The strategy over all workers of TF_CONFIG, or over this process where there is none."""

    def __init__(self) -> None:
        import tensorflow as tf

        from syncbn.multi_worker.board import board_of
        from syncbn.multi_worker.replicas import local_replica_count, worker_count, worker_index

        self.strategy: Any = tf.distribute.MultiWorkerMirroredStrategy()
        self.board = board_of(self.strategy)
        self.workers = worker_count(self.strategy)
        self.worker = worker_index(self.strategy)
        self.replicas = int(self.strategy.num_replicas_in_sync)
        local = local_replica_count(self.strategy)
        self.own_replicas = range(self.worker * local, (self.worker + 1) * local)

    @property
    def is_chief(self) -> bool:
        """Whether this is worker 0, which prints."""
        return self.worker == 0

    def exchange(self, name: str, value: Any) -> list[Any]:
        """Every worker's JSON value, in their order.

        Raises:
            WorkerError: a worker is gone, late, or elsewhere.
        """
        return [value] if self.board is None else self.board.exchange(f"selftest: {name}", value)

    def leave(self, code: int) -> NoReturn:
        """End this process with that code, at once, without TensorFlow's own goodbye."""
        if self.board is not None:
            self.board.leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
