"""Each repair is needed: without it a scenario that names it fails."""

import functools

import pytest
from tests.scenarios.compare import judge
from tests.scenarios.drive import drive
from tests.scenarios.scenario import load_table
from tests.scenarios.world import REFERENCE

from syncbn.multi_worker import REPAIRS

# The first test of a world waits for all that runs there.
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]

# Where a repair is shown to be needed: in the cheapest of the scenario's worlds.
PLACES = ("mirrored2", "workers2x1")


def witness(repair):
    """A scenario that names the repair, of the core if there is one, and the world to run it in."""
    for world in PLACES:
        named = [s for s in load_table().values() if repair in s.repairs and world in s.witnesses]
        if named:
            return max(named, key=lambda entry: bool(entry.core)).name, world
    return None


@functools.cache
def runs(world):
    """Every witness of the world without its repair, the world being started once."""
    found = [(repair.name, witness(repair.name)) for repair in REPAIRS]
    jobs = [f"{seen[0]}@{name}" for name, seen in found if seen and seen[1] == world]
    return drive(world, jobs, optimized=False)


@functools.cache
def reference():
    return drive(
        REFERENCE, sorted({w[0] for r in REPAIRS if (w := witness(r.name))}), optimized=False
    )


@pytest.mark.scenarios
@pytest.mark.parametrize("repair", [repair.name for repair in REPAIRS])
def test_a_scenario_fails_without_the_repair(repair):
    found = witness(repair)
    assert found, f"no scenario names the repair {repair!r}"
    name, world = found
    job = f"{name}@{repair}"
    verdict = judge(job, world, runs(world)[job], reference()[name][0])
    assert not verdict.same, f"{name} does not need {repair!r}: {verdict.words}"


def test_scenarios_name_repairs_that_there_are():
    named = {repair for entry in load_table().values() for repair in entry.repairs}
    assert named <= {repair.name for repair in REPAIRS}
