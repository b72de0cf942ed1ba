"""Rounds in which everything measured takes its turn, and the quartiles of what they give."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["quartiles", "take_turns"]


def take_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; who is first changes from round to round."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(3):  # traces, compiles, fills the caches
            steps[name]()
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median, and the two values that half of all lie between."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}
