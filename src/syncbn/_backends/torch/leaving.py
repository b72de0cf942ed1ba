"""Leaving a process at whose end a collective of gloo has just ended."""

from __future__ import annotations

import atexit
import time

__all__ = ["SECONDS"]

# What a thread that waits for the interpreter's lock needs, many times over.
SECONDS = 0.05

# A thread of gloo's lets go of a collective's tensors after those who wait for it have gone on, and
# needs the interpreter's lock for that. Where the interpreter ends in between the process is
# aborted ("terminate called without an active exception"), also behind `destroy_process_group()`:
# seen with torch 2.13; pytorch/pytorch#179291. Meanwhile the lock is free.
atexit.register(time.sleep, SECONDS)
