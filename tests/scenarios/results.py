"""The files of a run: what each worker observed of each scenario, or the error that it met."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

__all__ = [
    "TRACEBACK",
    "Observed",
    "error_array",
    "error_of",
    "read",
    "result_path",
    "started_path",
    "write",
]

Observed = dict[str, np.ndarray]
ERROR, TRACEBACK = "!error", "!traceback"


def result_path(folder: Path, job: str, worker: int) -> Path:
    return folder / f"{job}.worker{worker}.npz"


def started_path(folder: Path, job: str, worker: int) -> Path:
    return folder / f"{job}.worker{worker}.started"


def error_array(kind: str, message: str, traceback: str = "") -> Observed:
    """An error as a result: `kind` is the name of its type."""
    return {ERROR: np.array([kind, message]), TRACEBACK: np.array(traceback)}


def error_of(observed: Observed) -> tuple[str, str] | None:
    """Type and message of the error that a worker met."""
    if ERROR not in observed:
        return None
    kind, message = observed[ERROR]
    return str(kind), str(message)


def write(folder: Path, job: str, worker: int, observed: Observed) -> None:
    """At once or not at all: the process may be ended at any time."""
    path = result_path(folder, job, worker)
    part = path.with_suffix(".part.npz")
    np.savez(part, **observed)
    part.rename(path)


def read(folder: Path, jobs: Iterable[str], workers: int) -> dict[str, list[Observed]]:
    """What each worker observed, by scenario."""
    found = {}
    for job in jobs:
        found[job] = []
        for worker in range(workers):
            with np.load(result_path(folder, job, worker)) as arrays:
                found[job].append(dict(arrays))
    return found
