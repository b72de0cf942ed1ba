"""Runs scenarios in a world of processes: what hangs or crashes is noted, the rest runs anew."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.multiprocess.cluster import Ended, run_processes
from tests.scenarios.results import Observed, error_array, read, result_path, started_path, write
from tests.scenarios.scenario import SCENARIOS
from tests.scenarios.world import WORLDS

__all__ = ["drive"]

# Seconds for starting, above what the jobs may take.
STARTING = 60


def drive(
    world: str,
    jobs: Sequence[str],
    *,
    without: Sequence[str] = (),
    repaired: bool = True,
    optimized: bool = True,
    folder: Path | None = None,
) -> dict[str, list[Observed]]:
    """What each worker of the world observed of each job.

    Args:
        world: one of WORLDS.
        jobs: names of scenarios, or `SCENARIO@REPAIR`.
        without: repairs that are left out.
        repaired: whether there are any.
        optimized: whether TensorFlow optimizes its graphs, a fifth of the time.
        folder: for the results; temporary where it is None.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return drive(
                world,
                jobs,
                without=without,
                repaired=repaired,
                optimized=optimized,
                folder=Path(made),
            )
    workers = WORLDS[world].workers
    left = list(jobs)
    while left:
        arguments = [world, str(folder), "--only", ",".join(left), "--without", ",".join(without)]
        ended = run_processes(
            [sys.executable, "-m", "tests.scenarios.runner", *arguments]
            + ([] if repaired else ["--no-repairs"])
            + ([] if optimized else ["--not-optimized"]),
            workers,
            timeout=STARTING + sum(SCENARIOS[job.split("@")[0]].seconds for job in left),
            grace=2.0,
        )
        left = _left(folder, left, workers, ended)
    return read(folder, jobs, workers)


def _left(folder: Path, jobs: list[str], workers: int, ended: list[Ended]) -> list[str]:
    """The jobs that are still to be run, after noting the one that ended the processes."""
    for position, job in enumerate(jobs):
        missing = [w for w in range(workers) if not result_path(folder, job, w).exists()]
        if not missing:
            continue
        if not any(started_path(folder, job, worker).exists() for worker in range(workers)):
            if position == 0:
                raise RuntimeError("\n".join(f"worker ended: {one}" for one in ended))
            return jobs[position:]
        for worker in missing:
            status, output = ended[worker]
            kind = "Hang" if "Timeout (" in output else "Ended"
            if not started_path(folder, job, worker).exists() or status == -9:
                kind = "Peer"
            message = f"the process ended with {status}"
            write(folder, job, worker, error_array(kind, message, output[-8000:]))
        # One worker may have been further than the other.
        for later in jobs[position + 1 :]:
            _forget_scratch(folder, later)
            for worker in range(workers):
                for path in (result_path, started_path):
                    path(folder, later, worker).unlink(missing_ok=True)
        return jobs[position + 1 :]
    return []


def _forget_scratch(folder: Path, job: str) -> None:
    """Its files, and the marks of workers that have waited for each other."""
    for path in folder.iterdir():
        if path.name == f"scratch.{job}":
            shutil.rmtree(path)
        elif path.name.startswith(f"scratch.{job}."):
            path.unlink()
