"""Processes that look at a framework: whatever it does, this one goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Outcome", "run_probe"]

_PROBES = Path(__file__).parent / "probes"
_LOOK = 0.05  # seconds between two looks at what it has written
_LAST_LINES = 5
# What would make a framework join a cluster, which a look at one machine is not to do.
_OF_CLUSTERS = ("TF_CONFIG", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_OF_CLUSTERS_BEGIN = ("KERAS_DISTRIBUTION_", "MASTER_", "SYNCBN_")


@dataclass(frozen=True)
class Outcome:
    """How a probe ended, and what it had found by then.

    Attributes:
        ended: "well", "error" (it raised), "signal" (it was killed, as by a crash in C++), or
            "timeout" (it was still running, and was ended).
        status: the exit code, or the number of the signal.
        doing: what it was about when it ended.
        found: the findings, in their order.
        complaint: the last lines of what it wrote to stderr.
        seconds: that it ran.
    """

    ended: str
    status: int
    doing: str
    found: list[dict[str, Any]] = field(default_factory=list)
    complaint: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def first(self, name: str) -> Any:
        """The first finding of that name, or None."""
        return next((one[name] for one in self.found if name in one), None)

    def every(self, name: str) -> list[Any]:
        """All findings of that name."""
        return [one[name] for one in self.found if name in one]

    def trouble(self) -> str:
        """What went wrong, in words; empty if it ended well."""
        last = f" ({self.complaint[-1]})" if self.complaint else ""
        if self.ended == "timeout":
            return f"{self.doing!r} did not end within {self.seconds:.0f} s"
        if self.ended == "signal":
            return f"the process was killed by {_signal_name(self.status)} at {self.doing!r}"
        if self.ended == "error":
            return f"{self.doing!r} failed{last}"
        return ""


def run_probe(
    name: str,
    python: str,
    timeout: float,
    progress: Callable[[str], None],
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run a program of `probes/` by an interpreter, for at most so many seconds.

    Args:
        name: of the probe, without .py.
        python: the interpreter.
        timeout: seconds.
        progress: told what is being done, when that changes.
        environment: that is added to this process's.
    """
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in _OF_CLUSTERS and not key.startswith(_OF_CLUSTERS_BEGIN)
    }
    kept.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with tempfile.TemporaryDirectory(prefix="syncbn-doctor-") as folder:
        records = Path(folder) / "records"
        records.touch()
        command = [
            *(python, str(_PROBES / "start.py"), name, str(records)),
            *(str(Path(__file__).parents[2]), str(timeout)),
        ]
        with (Path(folder) / "stderr").open("wb+") as errors, _ended_by_sigterm():
            started = time.monotonic()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env={**kept, **(environment or {})},
                start_new_session=True,
            )
            try:
                late = _wait(process, records, started + timeout, progress)
            finally:
                _end(process)
            seconds = time.monotonic() - started
            errors.seek(0)
            complaint = _last_lines(errors.read())
        doing, found = _parsed(records)
    if late:
        return Outcome("timeout", 0, doing, found, complaint, seconds)
    if process.returncode < 0:
        return Outcome("signal", -process.returncode, doing, found, complaint, seconds)
    ended = "error" if process.returncode else "well"
    return Outcome(ended, process.returncode, doing, found, complaint, seconds)


def _wait(
    process: subprocess.Popen[bytes],
    records: Path,
    deadline: float,
    progress: Callable[[str], None],
) -> bool:
    """Until it ends, or until the deadline: whether that has passed."""
    told = ""
    while not _has_ended(process):
        doing = _parsed(records)[0]
        if doing != told:
            progress(doing)
            told = doing
        if time.monotonic() > deadline:
            return True
        time.sleep(_LOOK)
    return False


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it is no more; its number is kept, so that its group can still be named by it."""
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, flags) is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and all that it has started, which are a group of their own."""
    if hasattr(os, "killpg"):
        # macOS says "not permitted" where only a zombie is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _parsed(records: Path) -> tuple[str, list[dict[str, Any]]]:
    """What it was doing last, and all that it has found; a line that is half written is left."""
    doing, found = "start Python", []
    for line in records.read_text("utf-8", "replace").split("\n")[:-1]:
        record = json.loads(line)
        doing = record.get("doing", doing)
        if "found" in record:
            found.append(record["found"])
    return doing, found


def _last_lines(output: bytes) -> list[str]:
    lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines()]
    return [line[:300] for line in lines if line][-_LAST_LINES:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has none
        return f"signal {number}"


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as an exception does, so that no child is left."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    try:
        previous = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread, where no handler can be set
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
