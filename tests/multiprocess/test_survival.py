"""Training that is killed and started again ends with the weights of one that was not."""

import json
import random

import numpy as np
import pytest

from tests.multiprocess.cluster import free_ports
from tests.multiprocess.launching import Launch, wait_until
from tests.multiprocess.workers.survivor import EPOCHS, STEPS

pytestmark = pytest.mark.multiprocess
SURVIVOR = "tests.multiprocess.workers.survivor"
THREADS = {"TF_NUM_INTRAOP_THREADS": "1", "OMP_NUM_THREADS": "1"}
BOTH, CHIEF, OTHER = [0, 1], [0], [1]


def train(folder, kills, restarts):
    """The final weights and the optimizer's state, and what the launcher said."""
    folder.mkdir()
    one = Launch(folder, "", "--workers", "2", "--max-restarts", str(restarts), "--timeout", "60")
    one.environment |= THREADS
    arguments = [str(folder), json.dumps(kills)]
    one.command[-1:] = ["-m", SURVIVOR, *arguments]
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


@pytest.mark.survival
def test_killed_workers_are_resumed_to_the_same_bits(tmp_path, uninterrupted):
    """The chief, then both at a time; a worker alone is a check of `syncbn selftest`."""
    rng = random.Random(0)
    steps = [rng.randrange(epoch * STEPS, (epoch + 1) * STEPS) for epoch in (1, 3)]
    kills = [*zip(steps, (CHIEF, BOTH), strict=True)]
    found, result = train(tmp_path / "run", kills, 2)
    assert result.stderr.count("was killed by SIGKILL (exit code 137)") == 2
    assert_same_bits(found, uninterrupted)


POOL = """
import keras, numpy as np, syncbn, tensorflow as tf

class Ones(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return np.ones((8, 3), "float32"), np.ones((8, 1), "float32")

if __name__ == "__main__":
    syncbn.enable_multi_worker()
    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    for _ in range(2):
        model.fit(Ones(workers=2, use_multiprocessing=True), epochs=2, verbose=0)
    print("trained")
"""


@pytest.mark.survival
def test_the_processes_of_a_pydataset_end_with_their_worker(launch):
    """They are ended by SIGTERM, which TensorFlow catches in a worker, and in what it forks."""
    result = launch(POOL, "--workers", "2").run(60)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["[0] trained", "[1] trained"]


@pytest.mark.survival
def test_workers_of_two_launchers_are_resumed_together(tmp_path, uninterrupted):
    """As on two machines: each launcher knows only that a worker of its own has ended."""
    hosts = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    kills = [(STEPS + 2, OTHER), (2 * STEPS + 5, CHIEF)]
    launches = []
    for index in (0, 1):
        options = ("--hosts", hosts, "--index", str(index), "--max-restarts", "4")
        one = Launch(tmp_path, "", *options, "--timeout", "60")
        one.command[-1:] = ["-m", SURVIVOR, str(tmp_path), json.dumps(kills)]
        # Each takes the machine for its own; more threads add up in another order.
        one.environment |= THREADS
        launches.append(one)
    processes = [one.start() for one in launches]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    with np.load(tmp_path / "final.npz") as arrays:
        assert_same_bits([arrays[name] for name in arrays.files], uninterrupted)


@pytest.mark.survival
def test_a_launcher_that_was_killed_is_started_again_by_hand(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    folder.mkdir()
    one = Launch(folder, "", "--workers", "2")
    one.environment |= THREADS
    one.command[-1:] = ["-m", SURVIVOR, str(folder), "[]"]
    process = one.start()
    try:
        assert wait_until((folder / "backup" / "training_metadata.json").exists, 60)
        process.kill()
        assert wait_until(lambda: not one.processes(), 5)
        process.communicate()
    finally:
        one.kill_all()
    assert not (folder / "final.npz").exists()
    result = one.run(120)
    assert result.returncode == 0, result.stderr
    assert f"epochs {EPOCHS}" not in result.stdout  # it went on, and did not begin anew
    with np.load(folder / "final.npz") as arrays:
        assert_same_bits([arrays[name] for name in arrays.files], uninterrupted)


@pytest.mark.survival
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_at_a_random_step_ends_with_the_same_bits(tmp_path, uninterrupted, seed):
    rng = random.Random(seed)
    kills = [(rng.randrange(EPOCHS * STEPS), rng.choice([CHIEF, OTHER, BOTH]))]
    found, _ = train(tmp_path / "run", kills, 1)
    assert_same_bits(found, uninterrupted)
