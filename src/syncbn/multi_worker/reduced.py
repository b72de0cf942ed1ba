"""Whether the gradients in hand have been summed over the replicas already."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["are_reduced", "reduced_gradients"]

_thread = threading.local()


def are_reduced() -> bool:
    """Whether this thread, one replica's, is within `reduced_gradients`."""
    return bool(getattr(_thread, "reduced", False))


@contextlib.contextmanager
def reduced_gradients(reduced: bool = True) -> Iterator[None]:
    """For the code that gets summed gradients, on this replica."""
    before = are_reduced()
    _thread.reduced = reduced
    try:
        yield
    finally:
        _thread.reduced = before
