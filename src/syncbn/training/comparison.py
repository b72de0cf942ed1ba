"""How far the runs of a job are from one device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from syncbn.training.job import Run

__all__ = ["Difference", "Row", "differences", "rows"]

REFERENCE = "one device"


class Difference(NamedTuple):
    """The largest absolute difference from the model that one device trained."""

    weights: float  # kernels, biases, gammas, betas
    moving_statistics: float  # moving means and variances


class Row(NamedTuple):
    """A line of the table: one run after its last finished epoch."""

    run: str
    replicas: int
    epochs: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float  # of training, all epochs
    difference: Difference | None  # None without a reference, and of the reference itself


def differences(run: Run, reference: Run, moving: list[bool]) -> list[Difference]:
    """The difference after each epoch that both have finished.

    Args:
        run: compared with the reference.
        reference: one device.
        moving: for each weight in Keras's order, whether it is a moving statistic.
    """
    return [
        _difference(own.weights, its.weights, moving)
        for own, its in zip(run.epochs, reference.epochs, strict=False)
    ]


def _difference(own: list[Any], reference: list[Any], moving: list[bool]) -> Difference:
    largest = {True: 0.0, False: 0.0}
    for weight, expected, is_moving in zip(own, reference, moving, strict=True):
        gap = np.abs(weight.astype(np.float64) - expected.astype(np.float64))
        # np.maximum keeps a NaN, where max() would lose it.
        largest[is_moving] = float(np.maximum(largest[is_moving], gap.max(initial=0.0)))
    return Difference(weights=largest[False], moving_statistics=largest[True])


def rows(runs: list[Run], moving: list[bool]) -> list[Row]:
    """The table: a row for each run that finished an epoch, the reference first."""
    finished = [run for run in runs if run.epochs]
    reference = next((run for run in finished if run.name == REFERENCE), None)
    finished.sort(key=lambda run: run is not reference)
    return [_row(run, reference, moving) for run in finished]


def _row(run: Run, reference: Run | None, moving: list[bool]) -> Row:
    difference = None
    # After different numbers of epochs a difference would say nothing.
    if reference and run is not reference and len(run.epochs) == len(reference.epochs):
        difference = differences(run, reference, moving)[-1]
    last = run.epochs[-1]
    return Row(
        run=run.name,
        replicas=run.replicas,
        epochs=last.number,
        train_loss=last.train.loss,
        train_accuracy=last.train.accuracy,
        test_loss=last.test.loss,
        test_accuracy=last.test.accuracy,
        seconds=sum(epoch.seconds for epoch in run.epochs),
        difference=difference,
    )
