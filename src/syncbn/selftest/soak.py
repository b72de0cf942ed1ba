"""`soak`: many steps of `fit`, while memory, threads and open files must not grow."""

from __future__ import annotations

import gc
import itertools
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from syncbn.selftest.checks import Finding, Options
from syncbn.selftest.cluster import Cluster
from syncbn.selftest.training import data, new_model

__all__ = ["Usage", "growth", "run", "usage"]

STEPS_OF_AN_EPOCH = 50
SAMPLES = 32
# Between the first quarter and the end. The allocator and TensorFlow's thread pools still fill
# after the first steps. One collective that TensorFlow does not forget is 1.2 KiB a step.
MEBIBYTES = 6.0
THREADS = 4.0
FILES = 4.0


class Usage(NamedTuple):
    """What this process holds."""

    mebibytes: float  # resident; elsewhere than on Linux the peak
    threads: float  # of the system; elsewhere those of Python
    files: float  # open; 0 elsewhere


def usage() -> Usage:
    """Now, by the standard library alone."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        resident = int(fields["VmRSS"].split()[0]) / 1024
        files = sum(1 for _ in Path("/proc/self/fd").iterdir())
        return Usage(resident, int(fields["Threads"]), files)
    import resource
    import sys

    # Bytes on macOS, kibibytes on other systems.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Usage(peak / unit, threading.active_count(), 0)


def growth(samples: list[Usage]) -> Usage:
    """From the median of the second eighth to that of the last eighth: no single sample decides."""
    eighth = max(1, len(samples) // 8)
    before = np.median(np.array(samples[eighth : 2 * eighth] or samples[:1], float), axis=0)
    after = np.median(np.array(samples[-eighth:], float), axis=0)
    return Usage(*(float(number) for number in after - before))


def run(cluster: Cluster, options: Options) -> list[Finding]:
    """Growth of memory, threads and files from the first quarter to the end."""
    import keras

    samples: list[Usage] = []
    steps = itertools.count()
    every = max(1, options.steps // SAMPLES)

    def sample(*_: Any, **__: Any) -> None:
        if next(steps) % every == 0:
            gc.collect()  # or what waits for it would count as grown
            samples.append(usage())

    size = 4 * cluster.replicas
    epochs = max(1, round(options.steps / STEPS_OF_AN_EPOCH))
    x, y = data(size * -(-options.steps // epochs), seed=5)
    new_model(cluster).fit(
        x.astype("float32"),
        y.astype("float32"),
        batch_size=size,
        epochs=epochs,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=sample)],
    )
    grown = growth(samples)
    return [
        Finding("MiB of memory more", grown.mebibytes, MEBIBYTES),
        Finding("threads more", grown.threads, THREADS),
        Finding("open files more", grown.files, FILES),
    ]
