"""One player: a process of one framework that takes a turn when it is told to.

The driver, `benchmarks/peers.py`, writes a line of JSON and reads one:

    {"make": VARIANT, "shape": [16, 56, 56, 64], "replicas": 2}  ->  {"sample": [[...], ...]}
    {"run": NUMBER, "steps": 10}                                 ->  {"seconds": 0.12}

where NUMBER counts what has been made, from 0, the seconds are those of one step, and the sample
is a few values of the outputs and gradients: all players must give the same. The first line a
player writes says what it is. It ends where its input does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import numpy as np

__all__ = ["CORES", "Made", "arrays", "sample", "serve"]

# What TensorFlow and JAX start as many threads for.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Made(NamedTuple):
    """A step that is ready to be taken, with what it gives."""

    step: Callable[[], Any]  # returns when the device is done
    results: Callable[[], list[np.ndarray]]  # y, dx: the whole batch, channels last; dgamma, dbeta


def arrays(shape: list[int], replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and cotangents in float32, each replica's part behind the other on axis 0."""
    rng = np.random.default_rng(0)
    whole = (replicas * shape[0], *shape[1:])
    x = rng.normal(size=whole) + np.repeat(np.arange(replicas), shape[0]).reshape(
        -1, *(1 for _ in shape[1:])
    )
    return x.astype(np.float32), rng.normal(size=whole).astype(np.float32)


def sample(results: list[np.ndarray]) -> list[list[float]]:
    """Values at 32 places of each array, evenly spread."""
    flat = [np.asarray(array, np.float64).reshape(-1) for array in results]
    return [array[np.linspace(0, array.size - 1, 32).astype(int)].tolist() for array in flat]


def serve(make: Callable[[str, list[int], int], Made], **facts: Any) -> None:
    """Answer the driver until it is done.

    Args:
        make: prepares a step for a variant, the shape of a replica's part, and a replica count.
        **facts: what the player says of itself.
    """
    # What frameworks print must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    converse(make, sys.stdin, answers, facts)


def converse(
    make: Callable[[str, list[int], int], Made],
    requests: TextIO,
    answers: TextIO,
    facts: dict[str, Any],
) -> None:
    """The conversation of `serve`, on any pair of streams."""
    made: list[Made] = []

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say(facts)
    for line in requests:
        request = json.loads(line)
        if "make" in request:
            one = make(request["make"], request["shape"], request["replicas"])
            for _ in range(3):
                one.step()
            made.append(one)
            say({"sample": sample(one.results())})
        else:
            say({"seconds": seconds_of(made[request["run"]].step, request["steps"])})


def seconds_of(step: Callable[[], Any], steps: int) -> float:
    """Seconds of one step: the mean of several, after one that wakes the threads up again."""
    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps
