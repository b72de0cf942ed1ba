"""`syncbn train` in a process, with all that it starts in sight, or in this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from syncbn.training import data, job
from syncbn.training.settings import TrainSettings


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "syncbn", "train", *arguments]


class Job:
    """A job whose temporary files, and so its workers' job folder, are in a folder of its own."""

    def __init__(self, scratch: Path, *arguments: str, **environment: str) -> None:
        self.scratch = scratch
        self.process = subprocess.Popen(
            command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # The tests' own backend is not the job's.
            env={**os.environ, "TMPDIR": str(scratch), "KERAS_BACKEND": "", **environment},
        )

    def worker_pids(self) -> list[int]:
        """The processes whose command line names a folder of this job."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = path.read_bytes().decode().split("\0")
            except (OSError, UnicodeDecodeError):  # ended meanwhile, or none of ours
                continue
            if "syncbn.cli.train_worker" in arguments and str(self.scratch) in " ".join(arguments):
                found.append(int(path.parent.name))
        return sorted(found)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "what the test waits for did not come"
            time.sleep(0.05)

    def end(self, seconds: float = 60) -> Ended:
        try:
            stdout, stderr = self.process.communicate(timeout=seconds)
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGKILL)
                self.process.communicate()
        return Ended(self.process.returncode, stdout, stderr)


class Silent:
    """An observer of runs in this process."""

    def start(self, run, steps):
        pass

    def advance(self, loss):
        pass

    def stop_requested(self):
        return False


def in_this_process(**settings):
    """The last epoch of the same job on one device."""
    settings = TrainSettings(strategy="none", **settings)
    (run,) = job.plan(settings)
    assert job.train(run, settings, data.load(settings.data), Silent(), run.epochs.append)
    return run.epochs[-1]
