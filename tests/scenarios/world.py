"""Where a scenario runs: one device, replicas of one process, or workers. Made by name."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._backends.tensorflow.replicas import make_virtual_devices, mirrored_strategy
from syncbn.multi_worker.devices import replicas_on_all_devices

__all__ = ["REFERENCE", "WORLDS", "Shape", "World", "make_world"]


class Shape(NamedTuple):
    """How many processes, and how many replicas each."""

    workers: int
    local_replicas: int


# "one" is the reference, Keras as it is; "one_repaired" shows that the repairs leave it alone.
REFERENCE = "one"
WORLDS: dict[str, Shape] = {
    "one": Shape(1, 1),
    "one_repaired": Shape(1, 1),
    "mirrored2": Shape(1, 2),
    "mirrored4": Shape(1, 4),
    "workers2x1": Shape(2, 1),
    "workers2x2": Shape(2, 2),
}


@dataclass(frozen=True)
class World:
    """What a scenario is given.

    `strategy` is None on one device. `folder` is the same on every worker, new for each scenario.
    """

    name: str
    strategy: Any
    workers: int
    worker: int
    folder: Path

    @property
    def replicas(self) -> int:
        return self.strategy.num_replicas_in_sync if self.strategy else 1

    @property
    def is_chief(self) -> bool:
        return self.worker == 0

    def scope(self) -> Any:
        """The strategy's scope; on one device a context that does nothing."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def wait_for_workers(self, name: str, seconds: float = 20.0) -> None:
        """Return once every worker is here. By files: it must work where collectives do not."""
        if self.workers == 1:
            return
        _meetings[name] += 1
        stem = f"{self.folder.name}.{name}{_meetings[name]}."
        (self.folder.parent / f"{stem}{self.worker}").touch()
        deadline = time.monotonic() + seconds
        while any(not (self.folder.parent / f"{stem}{w}").exists() for w in range(self.workers)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"a worker never came to {name!r}")
            time.sleep(0.01)

    def files(self) -> list[str]:
        """What all workers have written into the scenario's folder, once they are all here."""
        self.wait_for_workers("files")
        found = sorted(
            str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()
        )
        # None goes on to write more before all have looked.
        self.wait_for_workers("files")
        return found


# How often this process has waited for the others, by name.
_meetings: Counter[str] = Counter()


def make_world(name: str, folder: Path) -> World:
    """The world of that name in this process, which for workers is one of them, by TF_CONFIG."""
    workers, local_replicas = WORLDS[name]
    if workers > 1:
        index = int(json.loads(os.environ["TF_CONFIG"])["task"]["index"])
        return World(name, _multi_worker_strategy(local_replicas), workers, index, folder)
    strategy = mirrored_strategy(local_replicas) if local_replicas > 1 else None
    return World(name, strategy, 1, 0, folder)


def _multi_worker_strategy(local_replicas: int) -> Any:
    """RING collectives: the default would be NCCL where there are GPUs. Timeouts are a repair's."""
    if local_replicas > 1:
        make_virtual_devices(local_replicas)
        # Kept to the process's end: not undone with the repairs that a scenario leaves out.
        replicas_on_all_devices(local_replicas).apply()
    experimental = tf.distribute.experimental
    return tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=experimental.CommunicationOptions(
            implementation=experimental.CommunicationImplementation.RING,
        )
    )
