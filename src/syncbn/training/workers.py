"""Runs that worker processes train: what the parent leaves for them, and they for the parent.

Both sides meet in a job folder: the settings as JSON, and a file for each finished epoch, written
by the chief as soon as it is finished, so that an interrupt loses none.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from syncbn._backends.classifier import Score
from syncbn.files import written_whole
from syncbn.launch import LaunchSettings, launch
from syncbn.training import data, job
from syncbn.training.job import Epoch, Observer, Run
from syncbn.training.settings import TrainSettings

__all__ = ["read_settings", "train_as_worker", "train_by_workers"]

_SETTINGS = "settings.json"


def train_by_workers(runs: list[Run], settings: TrainSettings, command: Sequence[str]) -> int:
    """Start the workers, and add the epochs that they finished to the runs that are theirs.

    Args:
        runs: the plan of the settings, whole.
        settings: of the job.
        command: to run as each worker; the job folder is added to it.

    Returns:
        0, the exit code of the first worker that failed, or 130 after Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="syncbn-job-") as name:
        folder = Path(name)
        text = json.dumps(dataclasses.asdict(settings))
        (folder / _SETTINGS).write_text(text, encoding="utf-8")
        # One device each: a run has as many replicas as workers, whatever the machine has.
        shape = LaunchSettings(
            workers=settings.replicas_in_sync, devices_per_worker=1, backend=settings.backend
        )
        code = launch([*command, name], shape)
        for number, run in enumerate(runs):
            while (path := _epoch_path(folder, number, len(run.epochs) + 1)).exists():
                run.epochs.append(_read_epoch(path))
    left = sum(settings.epochs - len(run.epochs) for run in runs if run.by_workers)
    if code == 0 and left:
        raise RuntimeError(
            f"Workers that end well must have finished every epoch. Received: {left} epoch(s) "
            "that were not. This is a defect of syncbn: report it."
        )
    return code


def read_settings(folder: Path) -> TrainSettings:
    """The settings that the parent left in the job folder."""
    return TrainSettings(**json.loads((folder / _SETTINGS).read_text(encoding="utf-8")))


def train_as_worker(folder: Path, index: int, observer: Observer) -> None:
    """Train all of the workers' runs, one after another, as the worker of that index."""
    settings = read_settings(folder)
    job.join_workers(settings)  # before anything else starts the framework
    dataset = data.load(settings.data)
    for number, run in enumerate(job.plan(settings)):
        if not run.by_workers:
            continue

        def keep(epoch: Epoch, number: int = number) -> None:
            _write_epoch(_epoch_path(folder, number, epoch.number), epoch)

        job.train(run, settings, dataset, observer, keep if index == 0 else None)


def _epoch_path(folder: Path, run: int, epoch: int) -> Path:
    return folder / f"run-{run}-epoch-{epoch}.npz"


def _write_epoch(path: Path, epoch: Epoch) -> None:
    weights = {f"weight-{number}": weight for number, weight in enumerate(epoch.weights)}
    with written_whole(path) as temporary:
        np.savez(
            temporary,
            allow_pickle=False,
            number=epoch.number,
            train=epoch.train,
            test=epoch.test,
            seconds=epoch.seconds,
            **weights,
        )


def _read_epoch(path: Path) -> Epoch:
    with np.load(path, allow_pickle=False) as file:
        weights = [file[f"weight-{i}"] for i in range(sum("weight-" in n for n in file.files))]
        return Epoch(
            number=int(file["number"]),
            train=Score(*file["train"].tolist()),
            test=Score(*file["test"].tolist()),
            seconds=float(file["seconds"]),
            weights=weights,
        )
