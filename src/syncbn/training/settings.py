"""What the main job is asked to do, and whether it can be done."""

from __future__ import annotations

import dataclasses
import math

from syncbn.errors import InputError
from syncbn.training.data import Dataset

__all__ = ["STRATEGIES", "TrainSettings"]

_LARGEST = 2**31 - 1
# Of each backend, its own first.
STRATEGIES = {
    "tensorflow": ("mirrored", "multiworker", "none"),
    "jax": ("data_parallel", "none"),
    "torch": ("data_parallel", "none"),
}


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training job.

    Attributes:
        data: "digits", "mnist" or the path of an .npz file.
        model: "mlp" or "convnet".
        norm: "sync", "local" or "keras" (Keras's own synchronization, which torch has none of).
        backend: Keras's, "tensorflow", "jax" or "torch".
        strategy: "mirrored" or "multiworker" on TensorFlow, "data_parallel" on JAX and torch, or
            "none" for one device.
        replicas: devices (on torch processes) that train in step, each on its part of the global
            batch; of "mirrored" and "data_parallel".
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
    backend: str = "tensorflow"
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
        if self.strategy == "none":
            return 1
        return self.workers if self.strategy == "multiworker" else self.replicas

    @property
    def by_processes(self) -> bool:
        """Whether the replicas are processes of their own, not devices of this one."""
        on_torch = self.backend == "torch" and self.strategy == "data_parallel"
        return on_torch or self.strategy == "multiworker"

    @property
    def norms(self) -> tuple[str, ...]:
        """The normalizations that there are on the backend."""
        return ("sync", "local") if self.backend == "torch" else ("sync", "local", "keras")

    def check(self) -> None:
        """Raise an InputError for the first value that cannot be meant."""
        if self.strategy not in STRATEGIES[self.backend]:
            raise InputError(
                f"--strategy must be one of {', '.join(STRATEGIES[self.backend])} on the backend "
                f"{self.backend}. Received: {self.strategy}. Choose one of them, or another "
                "--backend."
            )
        if self.norm not in self.norms:
            raise InputError(
                f"--norm must be one of {', '.join(self.norms)} on the backend {self.backend}, "
                f"where Keras does not synchronize. Received: {self.norm}. Choose one of them."
            )
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
                f"{self.kind}. Received: --batch-size {self.batch_size} for --{self.kind} "
                f"{self.replicas_in_sync}. Give a larger batch or fewer {self.kind}."
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
                f"{dataset.name}: training on {self.replicas_in_sync} {self.kind} needs at least "
                f"as many images. Received: {len(dataset.x_train)} in x_train. Use fewer "
                f"{self.kind}."
            )

    @property
    def kind(self) -> str:
        """What is counted: "workers" or "replicas"."""
        return "workers" if self.strategy == "multiworker" else "replicas"
