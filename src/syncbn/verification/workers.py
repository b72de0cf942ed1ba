"""Replicas that are processes: what the parent leaves for them, and they for the parent."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras

from syncbn.errors import WorkerError
from syncbn.launch import LaunchSettings, launch
from syncbn.verification.batches import Batches
from syncbn.verification.measuring import Sharing
from syncbn.verification.program import load_function, name_of
from syncbn.verification.running import backend, run
from syncbn.verification.settings import VerifySettings
from syncbn.verification.steps import OnReplicas, Steps, in_words

__all__ = ["needs_repair", "note_failure", "run_as_worker", "run_by_workers"]

_JOB = "job.pickle"


class _Job(NamedTuple):
    """What every worker reads."""

    function: str
    path: list[str]  # where modules are found, as in the parent
    batches: Batches
    replicas: int
    repair: bool
    hold: bool


def run_by_workers(
    build_model: Callable[[], Any],
    batches: Batches,
    settings: VerifySettings,
    folder: Path,
    hold: bool,
) -> OnReplicas:
    """Start the workers and wait for them; what they recorded is in the folder.

    Raises:
        InputError: they cannot import the function, or this machine cannot serve them.
    """
    count = settings.replicas_in_sync
    repair = settings.repair or backend().is_repaired()
    job = _Job(name_of(build_model), list(sys.path), batches, count, repair, hold)
    with (folder / _JOB).open("wb") as file:
        pickle.dump(job, file)
    framework = keras.backend.backend()
    command = [sys.executable, "-m", "syncbn.cli.verify_worker", str(folder)]
    # One device each; what they print is their framework's, and shown where one fails.
    shape = LaunchSettings(workers=count, devices_per_worker=1, backend=framework, quiet=True)
    code = launch(command, shape)
    processes = tuple(Steps(folder, f"worker-{index}") for index in range(count))
    failure = None
    if code == 130:
        raise KeyboardInterrupt
    if code:
        failure = WorkerError(
            f"all {count} workers have to finish. Received: exit code {code}"
            f"{_what_they_said(folder, count) or '; see the lines above'}"
        )
    return OnReplicas(
        processes=processes,
        sharing=Sharing(*backend().sharing_of_processes(count, repair)),
        devices=tuple(f"worker {index}" for index in range(count)),
        repair=backend().REPAIR,
        repaired=repair,
        failure=failure,
    )


def _what_they_said(folder: Path, count: int) -> str:
    paths = {index: _words_path(folder, index) for index in range(count)}
    # Who failed first: the others lose a peer, and say so later.
    said = [
        f"worker {index}: {path.read_text(encoding='utf-8')}"
        for index, path in sorted(
            (item for item in paths.items() if item[1].exists()),
            key=lambda item: item[1].stat().st_mtime_ns,
        )
    ]
    return f"; {said[0]}" if said else ""


def _words_path(folder: Path, index: int) -> Path:
    return folder / f"worker-{index}-failed.txt"


def note_failure(folder: Path, error: BaseException) -> None:
    """Leave a worker's last words for the parent."""
    path = _words_path(folder, int(os.environ["RANK"]))
    path.write_text(in_words(error), encoding="utf-8")


def run_as_worker(folder: Path) -> None:
    """Train as the worker that the environment says."""
    index = int(os.environ["RANK"])
    with (folder / _JOB).open("rb") as file:
        job: _Job = pickle.load(file)
    # Before anything else starts the framework.
    strategy = backend("replicas").strategy_over(job.replicas, by_processes=True)
    sys.path[:] = [*dict.fromkeys([*job.path, *sys.path])]
    build_model = load_function(job.function)
    run(
        build_model,
        job.batches,
        strategy,
        Steps(folder, "one-device").before,
        Steps(folder, f"worker-{index}").keep,
        job.hold,
        job.repair,
    )


def needs_repair(folder: Path) -> bool:
    """Whether the worker is to call `enable_multi_worker()`, which comes before all else."""
    with (folder / _JOB).open("rb") as file:
        job: _Job = pickle.load(file)
    return job.repair
