"""Keras's training on worker processes gives what one device gives: the core of the table."""

import pytest

from tests.scenarios.runs import assert_equals_one_device
from tests.scenarios.scenario import select

# The first test of a world waits for all that runs there.
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]

WORLDS = ["workers2x1"]


@pytest.mark.parametrize(
    ("world", "job"), [(world, job) for world in WORLDS for job in select(world, core=True)]
)
def test_training_on_workers_gives_what_one_device_gives(world, job):
    assert_equals_one_device(world, job)
