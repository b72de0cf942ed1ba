"""What a scenario is, and the table that the modules `table_*` fill."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.scenarios.world import REFERENCE, WORLDS, World

__all__ = [
    "EVERY",
    "FEW",
    "MULTI_WORKER",
    "REPLICAS",
    "REPLICATED",
    "SCENARIOS",
    "Scenario",
    "load_table",
    "scenario",
    "select",
]

EVERY = tuple(WORLDS)
REPLICATED = tuple(name for name in WORLDS if WORLDS[name] != WORLDS[REFERENCE])
MULTI_WORKER = tuple(name for name in WORLDS if WORLDS[name].workers > 1)

# Where the core runs: each further world costs as much again. `make test-scenarios` runs all.
FEW = ("one", "mirrored2", "workers2x1")
REPLICAS = ("one", "mirrored2")

# Several steps of training amplify the rounding of one, 2e-6.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Scenario:
    """A piece of training, and what must come out of it.

    `core`: the worlds in which `make test` runs it.
    `covers`: the defects of Keras that it meets, in words; `repairs`: those of the catalogue that
    it needs, each of which when left out makes it fail in the worlds `witnesses`. `error`: the
    type's name and words that must be raised in `error_worlds`, where there is no right result.
    `timeout`: seconds that a collective may take, fewer than `seconds`, after which the scenario
    counts as hanging. `breaks`: it leaves processes of no more use.
    """

    name: str
    run: Callable[[World], Mapping[str, Any]]
    covers: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    worlds: tuple[str, ...] = EVERY
    core: tuple[str, ...] = ()
    tolerance: float = TOLERANCE
    error: tuple[str, str] | None = None
    error_worlds: tuple[str, ...] = REPLICATED
    witnesses: tuple[str, ...] = ("mirrored2",)
    timeout: float = 75.0
    seconds: float = 150.0
    breaks: bool = False

    def observe(self, world: World) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in self.run(world).items()}


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    *,
    covers: Iterable[str] = (),
    repairs: Iterable[str] = (),
    name: str = "",
    **options: Any,
) -> Callable[[Callable[[World], Mapping[str, Any]]], Callable[[World], Mapping[str, Any]]]:
    """Put the function into the table under its own name (or the given one)."""

    def register(run: Callable[[World], Mapping[str, Any]]) -> Any:
        own = name or run.__name__
        assert own not in SCENARIOS, own
        assert not {*own} & {*",@/"}, own
        SCENARIOS[own] = Scenario(own, run, tuple(covers), tuple(repairs), **options)
        return run

    return register


def load_table() -> dict[str, Scenario]:
    """Import every module of the table."""
    for path in sorted(Path(__file__).parent.glob("table_*.py")):
        importlib.import_module(f"tests.scenarios.{path.stem}")
    return SCENARIOS


def select(world: str, *, core: bool = False, only: Iterable[str] = ()) -> list[str]:
    """Names of the scenarios (or jobs) that run in the world, in the table's order.

    Args:
        world: one of WORLDS.
        core: those of `make test` alone.
        only: these jobs, in their order.
    """
    table = load_table()
    chosen = []
    for job in only or table:
        entry = table[job.split("@")[0]]
        if world in entry.worlds and (world in entry.core or not core):
            chosen.append(job)
    return chosen
