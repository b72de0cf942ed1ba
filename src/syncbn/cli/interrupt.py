"""Ctrl-C as a flag, for work that must not be left in the middle."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Flag", "stop_flag"]


class Flag:
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.raised = False

    @contextmanager
    def lowered(self) -> Iterator[None]:
        """Ctrl-C is a KeyboardInterrupt within, for whoever waits for other processes."""
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


@contextmanager
def stop_flag() -> Iterator[Flag]:
    """Ctrl-C raises the flag, which is looked at between two steps; a second one ends at once.

    An exception in the middle of TensorFlow's tracing would leave its replica threads waiting.
    """
    flag = Flag()

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        flag.raised = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
