"""How a worker of a test ends: the chief last, and nobody by TensorFlow's own way."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from syncbn.multi_worker import watch


def leave() -> NoReturn:
    """At once, also where collectives were aborted: TensorFlow takes up to half a minute then."""
    watching = watch.current()
    if watching is not None:
        watching.stop()
    sys.stdout.flush()
    os._exit(0)
