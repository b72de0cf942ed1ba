"""Training that is killed and started again ends with the weights of one that was not."""

import json
import random

import numpy as np
import pytest

from tests.multiprocess.launching import Launch
from tests.multiprocess.workers.survivor import EPOCHS, STEPS

pytestmark = pytest.mark.multiprocess
BOTH, CHIEF, OTHER = [0, 1], [0], [1]


def train(folder, kills, restarts):
    """The final weights and the optimizer's state, and what the launcher said."""
    folder.mkdir()
    one = Launch(folder, "", "--workers", "2", "--max-restarts", str(restarts), "--timeout", "60")
    arguments = [str(folder), json.dumps(kills)]
    one.command[-1:] = ["-m", "tests.multiprocess.workers.survivor", *arguments]
    try:
        result = one.run(60 * (len(kills) + 1))
    finally:
        left = one.processes()
        one.kill_all()
    assert not left
    assert result.returncode == 0, result.stderr
    for step, workers in kills:
        assert any((folder / f"killed-{step}-{worker}").exists() for worker in workers)
    with np.load(folder / "final.npz") as arrays:
        return [arrays[name] for name in arrays.files], result


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    weights, result = train(tmp_path_factory.mktemp("whole") / "run", [], 0)
    assert f"epochs {EPOCHS}" in result.stdout
    return weights


def assert_same_bits(found, expected):
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_killed_workers_are_resumed_to_the_same_bits(tmp_path, uninterrupted):
    """The second worker, the chief, both at a time; before the first backup and after it."""
    rng = random.Random(0)
    steps = [rng.randrange(epoch * STEPS, (epoch + 1) * STEPS) for epoch in (0, 1, 3)]
    kills = [*zip(steps, (OTHER, CHIEF, BOTH), strict=True)]
    found, result = train(tmp_path / "run", kills, 3)
    assert result.stderr.count("was killed by SIGKILL (exit code 137)") == 3
    assert_same_bits(found, uninterrupted)


@pytest.mark.survival
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_at_a_random_step_ends_with_the_same_bits(tmp_path, uninterrupted, seed):
    rng = random.Random(seed)
    kills = [(rng.randrange(EPOCHS * STEPS), rng.choice([CHIEF, OTHER, BOTH]))]
    found, _ = train(tmp_path / "run", kills, 1)
    assert_same_bits(found, uninterrupted)
