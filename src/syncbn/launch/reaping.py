"""Nothing that a worker started survives.

A signal to the worker's process group misses what made a group or a session of its own. On Linux
the supervisor finds all that descends from it: what loses its parent is given to it. Should it be
killed itself, `launch()` finds every process with the launch's mark in its environment. Elsewhere
the groups are all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from syncbn.launch.spec import MARK

__all__ = [
    "MARK",
    "Family",
    "adopt_orphans",
    "end_marked",
    "marked",
    "new_mark",
    "tie_to_parent",
    "with_mark",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE = 10.0  # seconds for the kernel to end what was killed
_PERIOD = 1.0  # seconds between two looks for the orphans that have ended
_PROCESSES = Path("/proc")
# Loaded before any fork: loading takes locks, which another thread may hold at that moment.
_LIBRARY = ctypes.CDLL(None)


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


def adopt_orphans() -> None:
    """From now on all that descends from this process stays its descendant, on Linux."""
    if sys.platform == "linux":
        _LIBRARY.prctl(_PR_SET_CHILD_SUBREAPER, 1)


class Family:
    """What descends from this process, which adopts the orphans.

    Args:
        own: the children that whoever started them waits for.
    """

    def __init__(self, own: Iterable[int] = ()) -> None:
        self._own = frozenset(own)
        self._next = 0.0

    def living(self) -> list[int]:
        """All of it that runs."""
        parents = dict(filter(None, map(_parent, _PROCESSES.glob("[0-9]*"))))
        found = {os.getpid()}
        while more := {child for child, parent in parents.items() if parent in found} - found:
            found |= more
        return sorted(found - {os.getpid()})

    def reap(self) -> None:
        """Let the orphans go that have ended; looks for them from time to time."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PERIOD
        # Some kernels have no such file; the orphans then stay in the table until this one ends.
        with contextlib.suppress(OSError):
            children = (_PROCESSES / f"self/task/{os.getpid()}/children").read_text().split()
            for child in set(map(int, children)) - self._own:
                os.waitpid(child, os.WNOHANG)


def end_marked(mark: str, grace: float, family: Family | None = None) -> list[int]:
    """End all processes with the mark, and the family; who they were.

    SIGTERM, after so many seconds SIGKILL. Again and again until none is left, as one that is being
    killed may just have started another; but not for ever: one that waits for a broken disk cannot
    be ended at all.
    """

    def remaining() -> list[int]:
        return sorted({*marked(mark), *(family.living() if family else ())})

    first = remaining()
    killing = time.monotonic() + grace
    _send(first, signal.SIGTERM)
    while (left := remaining()) and time.monotonic() < killing + _PATIENCE:
        if time.monotonic() >= killing:
            _send(left, signal.SIGKILL)
        time.sleep(0.02)
    return first


def _parent(entry: Path) -> tuple[int, int] | None:
    """The number of a process and its parent's; None once it has ended."""
    try:
        # The name, in parentheses, may contain anything.
        state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
    except OSError:
        return None
    return None if state in {b"Z", b"X"} else (int(entry.name), int(parent))


def _send(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def tie_to_parent(parent: int) -> None:
    """In a new process: SIGKILL for it as soon as its parent is no more, even if that is killed."""
    if sys.platform == "linux":
        _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)
