"""What this process is doing: a number that all workers advance alike, and words.

Writing it costs an addition, so that every step can: it is read, and published to the other
workers, by a thread (see `watch`), and only where something waits does anyone look.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Progress", "progress"]


class Progress:
    """Where this process is in its program.

    `phase`: advances alike on all workers, whichever callbacks each of them has. `operation`: the
    number of the outermost fit, evaluate, …; `failed`: that one and why, once it ended by an error.
    `in_callback`: whether a callback is running, which may be on this worker alone. `batches`: the
    number of the batch that this process is in, or can no longer avoid. `asks`: how many requests
    to stop it knows of. `beats`: steps within one call of TensorFlow. `is_creating`: whether a
    variable is being made, outside of operations. `in_collective`: whether the watching thread has
    just seen a custom loop within a call that waits for others; `line`: where that loop was.
    `has_left`: whether the program is at its end.
    """

    def __init__(self) -> None:
        self.phase = 0
        self.operation = 0
        self.depth = 0
        self.in_callback = False
        self.failed: tuple[int, str] | None = None
        self.batches = 1
        self.beats = 0
        self.is_creating = False
        self.in_collective = False
        self.line: str | None = None
        self.asks = 0
        self.has_left = False
        self.epoch: int | None = None
        self._words: tuple[Any, ...] = ("nothing yet",)
        self._thread = threading.get_ident()

    def current_operation(self) -> int:
        """The number of the operation that runs, or that is about to begin."""
        return self.operation + (self.depth == 0)

    def advance(self, *words: Any) -> None:
        """The next phase; the words are joined only when someone reads them."""
        self._words = words
        self.phase += 1

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """While an operation runs. Only an outermost one counts as failed by its error."""
        outermost = self.depth == 0
        if outermost:
            self.operation += 1
            self.failed = None
            self._thread = threading.get_ident()
        self.advance(f"{name}()")
        in_callback, self.in_callback = self.in_callback, False
        epoch, self.epoch = self.epoch, None
        self.depth += 1
        try:
            yield
        except BaseException as error:
            if outermost:
                self.failed = (self.operation, f"{type(error).__name__}: {_first_line(error)}")
            raise
        finally:
            self.depth -= 1
            self.in_callback, self.epoch = in_callback, epoch
            self.advance(f"after {name}()" if outermost else f"after {name}() in a callback")

    @contextmanager
    def creating(self) -> Iterator[None]:
        """While a variable gets its value from the chief."""
        if self.depth == 0:
            self._thread = threading.get_ident()
            self.advance("creating a variable")
        before, self.is_creating = self.is_creating, True
        try:
            yield
        finally:
            self.is_creating = before

    def beat(self) -> None:
        """A step within a call of many."""
        self.beats += 1

    def is_waiting(self) -> bool:
        """Whether this process does what needs the others: not what a callback does alone."""
        return self.is_creating or (self.depth > 0 and not self.in_callback)

    def is_custom(self) -> bool:
        """Whether this process is in code of its own, in none of Keras's operations."""
        return self.depth == 0 and not self.is_creating

    def frame(self) -> FrameType | None:
        """The innermost frame of the working thread."""
        return sys._current_frames().get(self._thread)

    def place(self) -> tuple[int, ...]:
        """Where the working thread is: the same twice while it waits within one call."""
        frame = self.frame()
        position = () if frame is None else (id(frame), frame.f_lasti)
        return self.phase, self.beats, *position

    @contextmanager
    def callbacks(self, hook: str, words: str, number: int | None = None) -> Iterator[None]:
        """While the callbacks of one moment run."""
        epoch = () if self.epoch is None or "epoch" in hook else (f"of epoch {self.epoch + 1}",)
        self.advance(words, *(() if number is None else (number + 1,)), *epoch)
        outer, self.in_callback = self.in_callback, True
        try:
            yield
        finally:
            self.in_callback = outer

    def words(self) -> str:
        """What this process is doing, from what it noted and from its stack."""
        noted = " ".join(str(word) for word in self._words)
        if self.is_custom() and self.line:
            # What was noted is long ago, but for the operation that it is after.
            return f"{self.line}, {noted}" if noted.startswith("after") else self.line
        found = callback_in(self.frame())
        return f"{noted}, in callback {found}" if found else noted

    def record(self) -> dict[str, Any]:
        """What the other workers are told."""
        return {
            "phase": self.phase,
            "operation": self.operation,
            "failed": self.failed,
            "asks": self.asks,
            "in_collective": self.in_collective,
            "has_left": self.has_left,
            "words": self.words(),
        }


def callback_in(frame: FrameType | None) -> str | None:
    """The callback that a stack is in, as `EarlyStopping.on_epoch_end (line 12 of train.py)`."""
    while frame is not None:
        owner, _, method = frame.f_code.co_qualname.rpartition(".")
        owner = owner.rpartition(".")[2]
        if method.startswith("on_") and owner not in {"", "CallbackList", "<locals>"}:
            file = frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
            return f"{owner}.{method} (line {frame.f_lineno} of {file})"
        frame = frame.f_back
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


progress = Progress()
"""This process's."""
