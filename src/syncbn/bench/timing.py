"""Rounds in which the variants take turns, and medians and quartiles of their ratios.

A machine's speed drifts by more than the differences that are looked for. Variants that take turns
meet the same drift, and the ratio of two of one round cancels it: so ratios are taken within each
round, and their median and quartiles are reported, never the ratio of two separate means.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Quartiles", "interleaved", "ratio", "show", "summarize", "take_turns"]

# Traces, compiles and fills the caches.
_WARM_UP = 3

Figures = dict[str, dict[str, float]]


class Quartiles(NamedTuple):
    """A median, and a spread that half of the values lie in."""

    low: float  # first quartile
    median: float
    high: float  # third quartile

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Of at least two values."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    stop: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round; who is first changes from round to round.

    Args:
        steps: by name.
        rounds: how many times each is taken, after some that do not count.
        stop: called between steps; raises to end the measurement.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(_WARM_UP):
            stop()
            step()
    names = list(steps)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            stop()
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(own: Sequence[float], others: Sequence[float]) -> Quartiles:
    """How many times as fast as another: of the ratios other / own, round by round."""
    return Quartiles.of([other / one for one, other in zip(own, others, strict=True)])


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, baseline: str, *further: str
) -> Figures:
    """Figures of the steps, taken in turn: see `summarize`."""
    return summarize(take_turns(steps, rounds), baseline, *further)


def summarize(seconds: Mapping[str, Sequence[float]], baseline: str, *further: str) -> Figures:
    """Median milliseconds of each, and its speed relative to the baseline and to further ones.

    The quartiles are those of the ratio to the baseline; those of a further one carry its name.
    """
    return {name: _figure(seconds, name, baseline, further) for name in seconds}


def _figure(
    seconds: Mapping[str, Sequence[float]], name: str, baseline: str, further: Sequence[str]
) -> dict[str, float]:
    figure = {"milliseconds_median": round(1e3 * statistics.median(seconds[name]), 3)}
    for other in (baseline, *further):
        low, median, high = ratio(seconds[name], seconds[other])
        of_other = "" if other == baseline else f"_against_{other}"
        figure[f"times_as_fast_as_{other}"] = round(median, 3)
        figure[f"lower_quartile{of_other}"] = round(low, 3)
        figure[f"upper_quartile{of_other}"] = round(high, 3)
    return figure


def show(figures: Mapping[str, Mapping[str, float]], baseline: str) -> None:
    """Print a line for each variant."""
    for name, figure in figures.items():
        print(
            f"  {name:21} {figure['milliseconds_median']:8.2f} ms   "
            f"{figure[f'times_as_fast_as_{baseline}']:5.2f} times as fast as {baseline} "
            f"({figure['lower_quartile']:.2f} to {figure['upper_quartile']:.2f})"
        )
