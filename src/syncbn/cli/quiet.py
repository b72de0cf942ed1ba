"""Keeps TensorFlow's notices about its own build out of what the user reads."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from syncbn.launch.output import TENSORFLOW_NOTICES

__all__ = ["without_start_notices"]


@contextmanager
def without_start_notices() -> Iterator[None]:
    """Hold back stderr, also that of C++ code, then print all of it but those notices."""
    notices = tuple(notice.encode() for notice in TENSORFLOW_NOTICES)
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            held.seek(0)
            for line in held:
                if not line.startswith(notices):
                    os.write(2, line)
