"""Keras's training on replicas of one process gives what one device gives: the core's scenarios."""

import keras
import pytest
from tests.scenarios.runs import assert_equals_one_device
from tests.scenarios.scenario import select

# The first test of a world waits for all that runs there.
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        tuple(map(int, keras.__version__.split(".")[:2])) < (3, 11), reason="repairs Keras 3.11 on"
    ),
]

WORLDS = ["mirrored2"]


@pytest.mark.parametrize(
    ("world", "job"), [(world, job) for world in WORLDS for job in select(world, core=True)]
)
def test_training_on_replicas_gives_what_one_device_gives(world, job):
    assert_equals_one_device(world, job)
