"""Nothing that a worker started survives: found by a mark that its environment carries.

A signal to the worker's process group misses what made a group or a session of its own. On Linux
every process with the launch's mark in its environment is found; elsewhere the groups are all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

__all__ = ["MARK", "end_marked", "marked", "new_mark", "tie_to_parent", "with_mark"]

MARK = "SYNCBN_LAUNCH_ID"
_PR_SET_PDEATHSIG = 1
_PATIENCE = 10.0  # seconds for the kernel to end what was killed
_PROCESSES = Path("/proc")


def new_mark() -> str:
    """A mark that no other launch has."""
    return uuid.uuid4().hex


def with_mark(environment: Mapping[str, str], mark: str) -> dict[str, str]:
    """The environment with this mark; those of launches around this one stay, for their sweeps."""
    return {**environment, MARK: ":".join(filter(None, [environment.get(MARK), mark]))}


def marked(mark: str) -> list[int]:
    """The processes that carry the mark, but for this one; none where there is no /proc."""
    needle = mark.encode()
    found = []
    for entry in _PROCESSES.glob("[0-9]*"):
        # It may have ended meanwhile, or be another user's.
        with contextlib.suppress(OSError):
            if needle in (entry / "environ").read_bytes() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def end_marked(mark: str, grace: float) -> list[int]:
    """End all processes with the mark: SIGTERM, after so many seconds SIGKILL; who they were.

    Again and again until none is left, as one that is being killed may just have started another;
    but not for ever: one that waits for a broken disk cannot be ended at all.
    """
    first = marked(mark)
    killing = time.monotonic() + grace
    _send(first, signal.SIGTERM)
    while (left := marked(mark)) and time.monotonic() < killing + _PATIENCE:
        if time.monotonic() >= killing:
            _send(left, signal.SIGKILL)
        time.sleep(0.02)
    return first


def _send(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def tie_to_parent(parent: int) -> None:
    """In a new process: SIGKILL for it as soon as its parent is no more, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)
