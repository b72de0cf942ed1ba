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

__all__ = ["CHECKS", "Check", "Finding", "Options", "selected"]


class Finding(NamedTuple):
    """One figure, and the bound that it must not exceed."""

    what: str
    figure: float
    bound: float

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


def selected(names: str | None) -> list[Check]:
    """The checks of a list with commas, in the table's order; all for None.

    Raises:
        InputError: there is no check of such a name.
    """
    if names is None:
        return list(CHECKS)
    wanted = {name.strip() for name in names.split(",")}
    known = [check.name for check in CHECKS]
    if unknown := sorted(wanted - {*known}):
        raise InputError(
            f"--only requires names of checks: {', '.join(known)}. Received: {unknown}."
        )
    return [check for check in CHECKS if check.name in wanted]
