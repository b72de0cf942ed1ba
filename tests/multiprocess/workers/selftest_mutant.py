"""The selftest of a library that is broken on purpose: it must say so.

`python -m tests.multiprocess.workers.selftest_mutant MUTANT ARGUMENTS`
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras

import syncbn
from syncbn.selftest import __main__, soak

KEPT: list[Any] = []


def local() -> None:
    """Plain batch normalization: each replica by itself."""
    syncbn.SyncBatchNormalization = keras.layers.BatchNormalization


def leaky() -> None:
    """Each step keeps memory and a file."""
    usage = soak.usage

    def leak() -> Any:
        KEPT.append((os.urandom(2**20), os.open(os.devnull, os.O_RDONLY)))
        return usage()

    soak.usage = leak


def raising() -> None:
    """One worker fails in the middle of a check, alone."""
    from syncbn.selftest import layer

    compare = layer._compare

    def fail(cluster: Any, *args: Any) -> Any:
        if cluster.worker == 1:
            raise LookupError("no table of labels")
        return compare(cluster, *args)

    layer._compare = fail


if __name__ == "__main__":
    {"local": local, "leaky": leaky, "raising": raising, "none": lambda: None}[sys.argv[1]]()
    __main__.main(sys.argv[2:])
