"""Trains one model from the same weights on the same batches in several ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from syncbn import _backends
from syncbn._backends.classifier import Score
from syncbn.errors import InputError
from syncbn.training import models
from syncbn.training.data import Dataset
from syncbn.training.settings import TrainSettings

__all__ = [
    "Epoch",
    "Observer",
    "Run",
    "build_model",
    "check_optimizer",
    "join_workers",
    "plan",
    "prepare_devices",
    "train",
]


class Epoch(NamedTuple):
    """What one pass over the training examples came to."""

    number: int  # from 1
    train: Score  # while training, as the weights moved
    test: Score  # after it, in inference
    seconds: float  # of training, without the evaluation
    weights: list[Any]  # the model's weights after it, in Keras's order


class Run(NamedTuple):
    """One way to train, and the epochs that it finished."""

    name: str
    norm: str
    replicas: int
    epochs: list[Epoch]
    reordered: bool = False  # each batch back to front, which changes nothing but rounding
    by_workers: bool = False  # trained by processes of their own, a replica each


class Observer(Protocol):
    """Whoever watches a job, and may end it."""

    def start(self, run: str, steps: int) -> None:
        """A run begins, of so many steps."""

    def advance(self, loss: float) -> None:
        """One step is done; its mean loss."""

    def stop_requested(self) -> bool:
        """Whether to end the job now; an unfinished epoch is dropped."""


def plan(settings: TrainSettings) -> list[Run]:
    """The runs of a job, still without epochs: the wanted one first, then those to compare."""
    runs = [_on_replicas(settings.norm, settings)]
    if settings.compare:
        runs.append(Run("one device", "reference", 1, []))
        # Training amplifies rounding, the more the longer: this run says how far.
        runs.append(Run("reordered", "reference", 1, [], reordered=True))
        runs += [_on_replicas(norm, settings) for norm in settings.norms if norm != settings.norm]
    return runs


def prepare_devices(settings: TrainSettings) -> None:
    """Make the devices of the job; must come before anything else uses the framework."""
    # Processes have theirs to themselves.
    count = 1 if settings.by_processes else settings.replicas_in_sync
    _of_backend("replicas").prepare(count, settings.precision)


def join_workers(settings: TrainSettings) -> None:
    """Become one of the processes of a job; must come before anything else uses the framework."""
    _of_backend("replicas").strategy_over(settings.replicas_in_sync, by_processes=True)


def _of_backend(module: str) -> Any:
    return _backends.get(keras.backend.backend(), module)


def _on_replicas(norm: str, settings: TrainSettings) -> Run:
    replicas = settings.replicas_in_sync
    kind = f" worker{'s' * (replicas > 1)}" if settings.strategy == "multiworker" else ""
    return Run(f"{norm} × {replicas}{kind}", norm, replicas, [], by_workers=settings.by_processes)


def train(
    run: Run,
    settings: TrainSettings,
    dataset: Dataset,
    observer: Observer,
    keep: Callable[[Epoch], None] | None,
) -> bool:
    """Train one run, or as one of its workers take part in it.

    Args:
        run: which.
        settings: of the job.
        dataset: the same on all workers.
        observer: of each step.
        keep: given each epoch that is finished; None on workers whose epochs nobody reads, which
            then do not evaluate.

    Returns:
        True when all epochs were finished, False when the observer ended the job before.
    """
    strategy = _of_backend("replicas").strategy_over(run.replicas, by_processes=run.by_workers)
    loop = _of_backend("loop").ClassifierLoop(
        strategy,
        lambda: build_model(run, settings, dataset),
        lambda: _make_optimizer(settings),
    )
    steps_per_epoch = -(-len(dataset.x_train) // settings.batch_size)
    observer.start(run.name, settings.epochs * steps_per_epoch)
    order_source = np.random.default_rng(settings.seed)
    for number in range(1, settings.epochs + 1):
        order = order_source.permutation(len(dataset.x_train))
        if run.reordered:
            order = _back_to_front(order, settings.batch_size)
        start = time.perf_counter()
        losses = hits = 0.0
        batches = loop.batches(dataset.x_train, dataset.y_train, order, settings.batch_size)
        for batch, size in batches:
            if observer.stop_requested():
                return False
            batch_losses, batch_hits = loop.step(batch, size)
            losses += batch_losses
            hits += batch_hits
            observer.advance(batch_losses / size)
        score = Score(losses / len(order), hits / len(order))
        seconds = time.perf_counter() - start
        if keep is not None:
            test = loop.evaluate(dataset.x_test, dataset.y_test)
            keep(Epoch(number, score, test, seconds, loop.weights()))
    return True


def _back_to_front(order: Any, batch_size: int) -> Any:
    """The same batches of the same examples, each in reverse."""
    starts = range(0, len(order), batch_size)
    return np.concatenate([order[start : start + batch_size][::-1] for start in starts])


def build_model(run: Run, settings: TrainSettings, dataset: Dataset) -> Any:
    """The model of a run as it is before training, the same weights for every normalization."""
    model = models.build(
        settings.model,
        models.normalization_of(run.norm, run.replicas, settings.precision),
        dataset.x_train.shape[1:],
        dataset.classes,
        settings.precision,
    )
    models.draw_kernels(model, settings.seed)
    return model


def _make_optimizer(settings: TrainSettings) -> Any:
    optimizer = check_optimizer(settings)
    if settings.precision == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def check_optimizer(settings: TrainSettings) -> Any:
    """A new optimizer by the settings.

    Raises:
        InputError: Keras knows none of that name.
    """
    try:
        optimizer = keras.optimizers.get(settings.optimizer)
    except ValueError as error:
        raise InputError(
            "--optimizer must be the name of a Keras optimizer, such as adam, sgd or rmsprop. "
            f"Received: {settings.optimizer!r}. Choose one of them."
        ) from error
    if settings.learning_rate is not None:
        optimizer.learning_rate = settings.learning_rate
    return optimizer
