"""The core's runs for pytest: each world once a session, when the first test asks for it."""

from __future__ import annotations

import functools

from tests.scenarios.compare import judge
from tests.scenarios.drive import drive
from tests.scenarios.results import TRACEBACK, Observed
from tests.scenarios.scenario import select
from tests.scenarios.world import REFERENCE

__all__ = ["assert_equals_one_device", "core_runs"]


@functools.cache
def core_runs(world: str) -> dict[str, list[Observed]]:
    """What each worker of the world observed of each scenario of the core."""
    return drive(world, select(world, core=True), optimized=False)


def assert_equals_one_device(world: str, job: str) -> None:
    observed = core_runs(world)[job]
    verdict = judge(job, world, observed, core_runs(REFERENCE)[job][0])
    tracebacks = "\n".join(str(one.get(TRACEBACK, "")) for one in observed)
    assert verdict.same, f"{verdict.words}\n{tracebacks}"
