"""One worker's process: started so that it cannot outlive the supervisor, read, ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from syncbn.launch.output import Lines, Log, Screen
from syncbn.launch.reaping import tie_to_parent

__all__ = ["Stream", "Worker", "exit_code", "has_data", "in_words"]

CHUNK = 1 << 16
LARGEST_PIPE = 1 << 20  # what Linux lets an ordinary user ask for; else 64 KiB


class Stream(NamedTuple):
    """What this process reads a worker's standard output (1) or error (2) from."""

    descriptor: int
    channel: int
    is_terminal: bool
    lines: Lines


class Worker:
    """A worker of the group, from its start to its end."""

    def __init__(
        self,
        index: int,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Log,
        terminals: frozenset[int] = frozenset(),
    ) -> None:
        self.index = index
        self.name = name
        self.log = log
        self.streams: list[Stream] = []
        self.started = time.monotonic()
        parent = os.getpid()
        ends = [self._open(channel, channel in terminals) for channel in (1, 2)]
        try:
            self.process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=ends[0],
                stderr=ends[1],
                # A Ctrl-C of the terminal goes to the launcher, which says what happens.
                start_new_session=True,
                # No other thread here, but for one that looks up a host's name: what runs between
                # fork and exec is safe beside it.
                preexec_fn=lambda: tie_to_parent(parent),
            )
        except BaseException:
            self.close()
            raise
        finally:
            for end in ends:
                os.close(end)

    def _open(self, channel: int, is_terminal: bool) -> int:
        """Open a stream; the end that the worker writes to."""
        if is_terminal:
            reader, writer = pty.openpty()
            _as_wide_as(channel, writer)
        else:
            reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self.streams.append(Stream(reader, channel, is_terminal, Lines()))
        return writer

    def read(self, stream: Stream, screen: Screen) -> bool:
        """Pass on what has come; False once nothing can come any more."""
        try:
            data = os.read(stream.descriptor, CHUNK)
        except BlockingIOError:
            return True
        except OSError:  # how Linux says that a terminal has no writer left
            data = b""
        text = stream.lines.decode(data)
        lines = stream.lines.feed(text) if data else stream.lines.end()
        if stream.is_terminal:
            screen.live(stream.channel, self.index, text)
        for line in lines:
            self.log.add(line)
            if not stream.is_terminal:
                screen.line(stream.channel, self.index, line)
        return bool(data)

    def drain(self, screen: Screen) -> None:
        """Pass on what is left, after the worker's end.

        Its children may keep a pipe open, and write for ever: no more than a pipe holds is read.
        """
        for stream in self.streams:
            for _ in range(LARGEST_PIPE // CHUNK):
                if not (has_data(stream.descriptor) and self.read(stream, screen)):
                    break
            for line in stream.lines.end():
                self.log.add(line)
                if not stream.is_terminal:
                    screen.line(stream.channel, self.index, line)
        self.close()

    def close(self) -> None:
        """Give the descriptors back."""
        for stream in self.streams:
            with contextlib.suppress(OSError):
                os.close(stream.descriptor)
        self.streams.clear()

    def status(self) -> int | None:
        """None while it runs, else its exit code or the negative number of the signal.

        It stays a zombie, so that its number, which is its group's, is nobody else's until `reap`.
        """
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self.process.poll()
        if self.process.returncode is not None:
            return self.process.returncode
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        ended = os.waitid(os.P_PID, self.process.pid, options)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def send(self, number: int, *, group: bool = False) -> None:
        """A signal to the worker, or to its whole process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if group:
                os.killpg(self.process.pid, number)
            elif self.status() is None:
                os.kill(self.process.pid, number)

    def reap(self) -> None:
        """End whatever is left of its process group, and it."""
        if self.process.returncode is None:
            self.send(signal.SIGKILL, group=True)
        self.process.wait()


def exit_code(status: int) -> int:
    """The exit code that a shell would give: 128 and the signal's number for one that was killed.

    Args:
        status: as `subprocess.Popen.returncode`, negative for a signal.
    """
    return 128 - status if status < 0 else status


def in_words(status: int) -> str:
    """How a process ended: "was killed by SIGKILL (exit code 137)"."""
    if status >= 0:
        return f"ended with exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name} (exit code {exit_code(status)})"


def has_data(descriptor: int) -> bool:
    """Whether a read would not wait."""
    poll = select.poll()  # select() knows no descriptor from 1024
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _as_wide_as(channel: int, terminal: int) -> None:
    """Give a new terminal the size of ours, and keep it from adding carriage returns."""
    attributes = termios.tcgetattr(terminal)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(channel, termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
