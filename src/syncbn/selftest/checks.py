"""What a check reports, and the table of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from syncbn.errors import InputError

if TYPE_CHECKING:
    from syncbn.selftest.cluster import Cluster

__all__ = ["CHECKS", "RESUME", "Check", "Finding", "Options", "check_steps", "lines", "selected"]


LEAST_STEPS = 40


class Finding(NamedTuple):
    """One figure, and the bound that it must not exceed."""

    what: str
    figure: float
    bound: float

    def __str__(self) -> str:
        return f"{self.what:48} {self.figure:8.2g}  (≤ {self.bound:.2g})"

    @property
    def holds(self) -> bool:
        """Written so that NaN fails."""
        return math.isfinite(self.figure) and self.figure <= self.bound


class Options(NamedTuple):
    """What the user can set."""

    steps: int = 300


@dataclass(frozen=True)
class Check:
    """One line of the table. `module` has `run(cluster, options) -> list[Finding]`."""

    name: str
    what: str
    module: str

    def run(self, cluster: Cluster, options: Options) -> list[Finding]:
        """What this worker found."""
        function: Callable[[Cluster, Options], list[Finding]] = import_module(self.module).run
        return function(cluster, options)


CHECKS = (
    Check("layer", "SyncBatchNormalization in strategy.run", "syncbn.selftest.layer"),
    Check("fit", "Keras's fit, a ragged last batch", "syncbn.selftest.fit"),
    Check("uneven", "workers with unequal numbers of batches", "syncbn.selftest.uneven"),
    Check("soak", "resources over many steps of fit", "syncbn.selftest.soak"),
)


# What takes a launcher: it is no part of a worker's program.
RESUME = Check("resume", "a worker is killed, the group restarts", "syncbn.selftest.resume")


def selected(names: str | None, *more: Check) -> list[Check]:
    """The checks of a list with commas, in the table's order; all for None. `more`: beyond CHECKS.

    Raises:
        InputError: there is no check of such a name.
    """
    checks = [*CHECKS, *more]
    if names is None:
        return checks
    wanted = {name.strip() for name in names.split(",")}
    known = [check.name for check in checks]
    if unknown := sorted(wanted - {*known}):
        raise InputError(
            f"--only requires names of checks: {', '.join(known)}. Received: {', '.join(unknown)}."
        )
    return [check for check in checks if check.name in wanted]


def check_steps(steps: int) -> None:
    """Raise an InputError for too few steps to say anything about growth."""
    if steps < LEAST_STEPS:
        raise InputError(f"--steps requires at least {LEAST_STEPS}. Received: {steps}.")


def lines(check: Check, found: list[str], passed: bool) -> str:
    """Those of one check: the verdict, and below it what it rests on."""
    verdict = f"{check.name:8}{check.what:52}{'ok' if passed else 'FAILED'}"
    return "\n".join([verdict, *(f"          {one}" for one in found)])
