"""What the main job is asked to do, and whether it can be done."""

from __future__ import annotations

import dataclasses
import math

from syncbn.errors import InputError
from syncbn.training.data import Dataset

__all__ = ["TrainSettings"]

_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training job.

    Attributes:
        data: "digits", "mnist" or the path of an .npz file.
        model: "mlp" or "convnet".
        norm: "sync", "local" or "keras" (Keras's own synchronization).
        strategy: "mirrored", "multiworker", or "none" for one device.
        replicas: devices that train in step, each on its part of the global batch; of "mirrored".
        workers: processes that do so; of "multiworker".
        epochs: passes over the training examples.
        batch_size: examples in the global batch.
        optimizer: a name that `keras.optimizers.get` knows.
        learning_rate: None for the optimizer's own.
        seed: of the weights and of the order of the examples.
        precision: a Keras dtype policy, such as "float32" or "mixed_float16".
        compare: also train the other normalizations and one device, and compare.
    """

    data: str = "digits"
    model: str = "mlp"
    norm: str = "sync"
    strategy: str = "mirrored"
    replicas: int = 2
    workers: int = 2
    epochs: int = 10
    batch_size: int = 32
    optimizer: str = "adam"
    learning_rate: float | None = None
    seed: int = 0
    precision: str = "float32"
    compare: bool = False

    @property
    def replicas_in_sync(self) -> int:
        """How many replicas train: what the strategy's own setting says, without a strategy one."""
        return {"mirrored": self.replicas, "multiworker": self.workers}.get(self.strategy, 1)

    def check(self) -> None:
        """Raise an InputError for the first value that cannot be meant."""
        for name, value in (
            ("--replicas", self.replicas),
            ("--workers", self.workers),
            ("--epochs", self.epochs),
            ("--batch-size", self.batch_size),
        ):
            if not 1 <= value <= _LARGEST:
                raise InputError(
                    f"{name} must be at least 1 and at most {_LARGEST}. Received: {value}. "
                    "Give another number."
                )
        if self.batch_size < self.replicas_in_sync:
            raise InputError(
                "--batch-size, which is that of the global batch, must be at least the number of "
                f"{self._kind}. Received: --batch-size {self.batch_size} for --{self._kind} "
                f"{self.replicas_in_sync}. Give a larger batch or fewer {self._kind}."
            )
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(
                "--learning-rate must be a positive number. Received: "
                f"{self.learning_rate}. Give one, or leave it out for the optimizer's own."
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(
                f"--seed must be from 0 to 4294967295. Received: {self.seed}. Give another."
            )

    def check_against(self, dataset: Dataset) -> None:
        """Raise an InputError if these data cannot be trained on like this."""
        if len(dataset.x_train) < self.replicas_in_sync:
            raise InputError(
                f"{dataset.name}: training on {self.replicas_in_sync} {self._kind} needs at least "
                f"as many images. Received: {len(dataset.x_train)} in x_train. Use fewer "
                f"{self._kind}."
            )

    @property
    def _kind(self) -> str:
        return "workers" if self.strategy == "multiworker" else "replicas"
