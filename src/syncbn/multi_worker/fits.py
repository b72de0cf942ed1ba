"""The fit that runs: its seed, which all workers share, and its epoch.

What is random in an epoch is a function of these two, so that a fit which is resumed at an epoch
goes on as if it had never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from syncbn.multi_worker.board import agree

__all__ = ["Fit", "current", "generator", "inside"]


@dataclass
class Fit:
    """`seed`: the chief's, None until the workers have agreed on it. `epoch`: from 0.

    `counts_passes`: whether the order is that of a pass over the data, not of an epoch.
    """

    seed: int | None = None
    epoch: int = 0
    counts_passes: bool = False

    def agreed_seed(self, strategy: Any) -> int:
        """The chief's seed on every worker; each must call it.

        Drawn from the chief's `random`, so that `keras.utils.set_random_seed` reproduces it.
        """
        if self.seed is None:
            self.seed = int(agree(strategy, "the seed of the shuffle", random.randrange(2**31)))
        return self.seed


_running: list[Fit] = []


def current() -> Fit | None:
    """The innermost fit, as a callback may begin one of its own."""
    return _running[-1] if _running else None


@contextmanager
def inside() -> Iterator[Fit]:
    """While a fit runs."""
    fit = Fit()
    _running.append(fit)
    try:
        yield fit
    finally:
        _running.pop()


def generator(seed: int, number: int) -> random.Random:
    """The random numbers of one epoch, or of one pass over the data."""
    return random.Random(f"{seed}/{number}")  # hashed: integers of two words may coincide
