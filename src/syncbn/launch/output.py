"""What of the workers' output is shown, and how.

Every line has its worker's number before it. Progress bars, which rewrite a line, are shown of
worker 0 alone: as they move on a terminal, as their last state elsewhere. The others' are left out
here and, as last states, stand in the log files.
"""

from __future__ import annotations

import codecs
import math
import os
import re
import select
import time
from collections import deque
from collections.abc import Callable
from typing import BinaryIO

__all__ = ["TENSORFLOW_NOTICES", "Lines", "Log", "Screen", "is_progress", "prefix", "settled"]

# What TensorFlow writes of its own build while it is imported, before any log level applies.
TENSORFLOW_NOTICES = ("I0000 ", "WARNING: All log messages before absl::InitializeLog()")
LAST_LINES = 20
# A bar that is never ended by a new line must not grow for ever.
_LONGEST = 1 << 16
# So much a pipe takes without waiting once it takes anything at all (POSIX's PIPE_BUF).
_PIECE = 512
_LOOK = 0.1  # seconds between two looks whether all is to end, while nobody reads
_PATIENCE = 1.0  # seconds that a reader then has
_SHOW_CURSOR = "\x1b[?25h"
_CURSOR = {"\x1b[?25l": set[int].add, _SHOW_CURSOR: set[int].discard}
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\b]")  # what a terminal obeys and does not show
_HEADING = re.compile(r"Epoch \d+/\d+")  # what Keras writes above a bar


def prefix(worker: int) -> str:
    """What stands before the lines of a worker."""
    return f"[{worker}] "


def settled(line: str) -> str:
    """What is left to see of a line after its rewriting: the last state of a bar."""
    states = [state for state in re.split(r"[\r\b]+", line) if state.strip()]
    return states[-1] if states else ""


def is_progress(line: str) -> bool:
    """Whether the line is a progress bar, or the heading of Keras's."""
    body = line.rstrip("\r")
    return "\r" in body or "\b" in body or _HEADING.fullmatch(body) is not None


class Lines:
    """The lines in a stream of bytes, as they come."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.rest = ""

    def decode(self, data: bytes) -> str:
        """The text of these bytes; a character may come in two pieces."""
        return self._decoder.decode(data)

    def feed(self, text: str) -> list[str]:
        """The lines that this text ends, without their ends."""
        *lines, self.rest = (self.rest + text).split("\n")
        if len(self.rest) > _LONGEST:
            before, mark, last = self.rest.rpartition("\r")
            if before and mark:
                self.rest = f"\r{last}"  # an older state of a bar is not needed again
            else:
                lines.append(self.rest)
                self.rest = ""
        return lines

    def end(self) -> list[str]:
        """What stands after the last line's end, when no more comes."""
        rest, self.rest = self.rest + self._decoder.decode(b"", final=True), ""
        return [rest] if rest else []


class Log:
    """The last lines of one worker and, if wanted, all of them in a file.

    Args:
        file: unbuffered; None for none.
        tell: takes what is to be said where the file cannot be written to.
    """

    def __init__(self, file: BinaryIO | None, tell: Callable[[str], object] = str) -> None:
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._file = file
        self._tell = tell

    def begin(self, heading: str) -> None:
        """A new process of this worker; what the one before wrote last is its own."""
        self.last.clear()
        self._write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {heading}\n")

    def add(self, line: str) -> None:
        """Keep a line."""
        text = settled(line)
        if text or not line:
            if not text.startswith(TENSORFLOW_NOTICES):  # never the reason for anything
                self.last.append(text)
            self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        """A disk that is full is no reason to end a training."""
        if self._file is None:
            return
        try:
            self._file.write(text.encode("utf-8", "replace"))
        except OSError as error:
            self._tell(
                f"--log-dir requires room for the output. Received: {error.strerror or error} at "
                f"{self._file.name}. The workers go on; this file ends here. Make room"
            )
            self._file = None


class Screen:
    """Standard output and standard error of the launcher, shared by all workers.

    `hidden`: how lines begin that are left out; the log files have them. `is_ending`: whether all
    is to end, so that a reader who reads no more is not waited for.

    The chief's streams that are terminals here are terminals for it, and are passed on as they
    come. A line of another worker that comes while the chief's bar stands there takes its place,
    and the bar is drawn again below.
    """

    def __init__(
        self, hidden: tuple[str, ...] = (), is_ending: Callable[[], bool] = lambda: False
    ) -> None:
        self.only_chief = False
        self._is_ending = is_ending
        self._hidden = hidden
        self._hiding = False  # whether a line of the terminal that is left out goes on
        self._bar = ""  # what stands in the terminal's last line
        self._bar_channel = 2
        self._hidden_cursor: set[int] = set()  # the channels where a bar has hidden it
        self._lost: set[int] = set()

    def line(self, channel: int, worker: int, line: str) -> None:
        """A whole line of a worker; channel 1 is standard output, 2 standard error."""
        if worker > 0 and (self.only_chief or is_progress(line)):
            return
        if not line.startswith(self._hidden or "\n"):
            self._write(channel, f"{prefix(worker)}{settled(line)}\n")

    def live(self, channel: int, worker: int, text: str) -> None:
        """A piece of what a worker writes to its terminal."""
        for sequence, change in _CURSOR.items():
            if sequence in text:
                change(self._hidden_cursor, channel)
        pieces = text.split("\n")
        for number, piece in enumerate(pieces):
            end = "\n" if number < len(pieces) - 1 else ""
            starts = not self._bar and not self._hiding and _CONTROLS.sub("", piece) != ""
            self._hiding = self._hiding or (starts and piece.startswith(self._hidden or "\n"))
            if not self._hiding:
                shown = prefix(worker) + piece if starts else piece
                self._raw(channel, shown + end)
                if starts or self._bar:
                    self._bar = (self._bar + shown).rpartition("\r")[2][-_LONGEST:]
                    self._bar_channel = channel
                if end:
                    self._bar = ""
            self._hiding = self._hiding and not end

    def note(self, text: str) -> None:
        """A line of the launcher's own, on standard error."""
        self._write(2, f"syncbn launch: {text}\n")

    def plain(self, text: str) -> None:
        """A line that belongs to a note."""
        self._write(2, f"{text}\n")

    def close(self) -> None:
        """Leave the terminal at the start of a line, with a cursor, however the chief ended."""
        if self._bar:
            self._raw(self._bar_channel, "\n")
        for channel in self._hidden_cursor:
            self._raw(channel, _SHOW_CURSOR)
        self._hidden_cursor.clear()
        self._bar = ""
        self._hiding = False

    def _write(self, channel: int, text: str) -> None:
        if self._bar and os.isatty(channel):
            self._raw(channel, f"\r\x1b[K{text}{self._bar}")
        else:
            self._raw(channel, text)

    def _raw(self, channel: int, text: str) -> None:
        """Whoever read this may have gone: that is no reason to end a training."""
        data = text.encode("utf-8", "replace")
        while data and channel not in self._lost:
            if not self._is_taken(channel):
                self._lost.add(channel)
                return
            try:
                data = data[os.write(channel, data[:_PIECE]) :]
            except BlockingIOError:  # whoever started us left it so, and another writes there too
                continue
            except OSError:
                self._lost.add(channel)

    def _is_taken(self, channel: int) -> bool:
        """Wait until a piece can be written; False where all is to end and nobody reads.

        A write that waits would keep this process from every signal, and from its duty to end the
        workers when the launcher is killed.
        """
        poll = select.poll()
        poll.register(channel, select.POLLOUT)
        deadline = math.inf
        while not poll.poll(_LOOK * 1000):
            if deadline == math.inf and self._is_ending():
                deadline = time.monotonic() + _PATIENCE
            if time.monotonic() >= deadline:
                return False
        return True
