"""What the training loops of all backends have in common: the batches, their parts, the scores.

Each backend offers the same two modules to `syncbn.training`:

    loop.ClassifierLoop(strategy, make_model, make_optimizer)
        a `Loop`: the model and the optimizer are made where the strategy says;
    replicas.prepare(devices, precision), replicas.strategy_over(replicas, by_processes)
        makes the devices, before anything else uses the framework; what a loop is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Batch", "Loop", "Score", "part_of"]


class Score(NamedTuple):
    """Means over examples."""

    loss: float  # categorical cross-entropy, in nats
    accuracy: float  # share of right answers, 0..1


class Batch(NamedTuple):
    """A global batch, which every process has whole and of which every replica takes its part."""

    x: Any
    y: Any
    full_size: int  # of all batches but the last, which may be smaller


def part_of(full_size: Any, replica: Any, replicas: int) -> tuple[Any, Any]:
    """Where a replica's part of a global batch starts and ends: as it is of a full batch.

    Of the last batch a part may be smaller, or empty. Integers, or tensors of them.
    """
    start, end = (-(-full_size * number // replicas) for number in (replica, replica + 1))
    return start, end


class Loop(ABC):
    """Trains a classifier over replicas, and evaluates it on one device.

    Keras's own `fit` divides the mean loss of each replica by the number of replicas, which is
    wrong as soon as they hold different numbers of examples, as they do in the last batch of most
    epochs. Here the loss of an example is divided by the size of the global batch.

    Where the replicas are in several processes, all of these make the same calls with the same
    arrays, except for `evaluate` and `weights`: these need no other process.

    Attributes:
        model: a built Keras model whose outputs are probabilities.
    """

    model: Any

    def batches(self, x: Any, y: Any, order: Any, batch_size: int) -> Iterator[tuple[Batch, int]]:
        """The examples in that order, in global batches, and their sizes; the last is the rest."""
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield Batch(x[chosen], y[chosen], batch_size), len(chosen)

    @abstractmethod
    def step(self, batch: Batch, size: int) -> tuple[float, float]:
        """One step of the optimizer; the sums over the batch of losses and of right answers.

        Raises:
            WorkerError: another process is gone.
        """

    @abstractmethod
    def infer(self, x: Any) -> Any:
        """Probabilities in inference as a NumPy array, shape (N, classes), on one device."""

    def evaluate(self, x: Any, y: Any, batch_size: int = 512) -> Score:
        """Loss and accuracy in inference, with the weights that saving the model would keep."""
        losses = hits = 0.0
        for start in range(0, len(x), batch_size):
            labels = y[start : start + batch_size]
            probabilities = self.infer(x[start : start + batch_size])
            of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
            losses -= float(np.log(np.maximum(of_label, 1e-7)).sum())
            hits += float((probabilities.argmax(axis=-1) == labels).sum())
        return Score(losses / len(x), hits / len(x))

    def weights(self) -> list[Any]:
        """A copy of the model's weights, in Keras's order."""
        return [np.array(weight) for weight in self.model.get_weights()]
