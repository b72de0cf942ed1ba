"""Ray's own trainers, on a real Ray of this machine, train Keras 3 to what one device gives."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from syncbn.errors import InputError, NotSynchronizableError
from tests.integrations import on_ray

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "PYTHONPATH": str(ROOT)}

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]


def program(*command, folder, backend="tensorflow", seconds=300):
    result = subprocess.run(
        ["timeout", "-k", "10", str(seconds), sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    return result.stdout + result.stderr


def train(folder, *runs):
    """The metrics of each of these runs, in one Ray."""
    program(ROOT / "tests/integrations/on_ray.py", folder, json.dumps(runs), folder=folder)
    return json.loads((folder / "metrics.json").read_text())


def saved(folder, name, rank=0):
    with np.load(folder / f"{name}-{rank}.npz") as file:
        return [file[key] for key in file.files]


def noted(folder, name, rank=0):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


ONE_DEVICE = """
import sys
from tests.integrations import on_ray
model = on_ray.model_of()
x, y = on_ray.data()
history = model.fit(x, y, batch_size=on_ray.BATCH, epochs=2, verbose=0, shuffle=False)
on_ray.save(model, sys.argv[1])
print("loss", history.history["loss"][-1])
"""


def test_two_workers_train_as_one_device_and_report(tmp_path):
    """Of 42 rows in batches of 12: the last is ragged."""
    (reported,) = train(tmp_path, {"name": "both", "epochs": 2, "shuffle": False})
    alone = tmp_path / "alone.npz"
    printed = program("-c", ONE_DEVICE, alone, folder=tmp_path)
    loss = float(re.search(r"^loss (.*)$", printed, re.MULTILINE)[1])
    with np.load(alone) as file:
        expected = [file[key] for key in file.files]
    pairs = saved(tmp_path, "both"), saved(tmp_path, "both", 1), expected
    for mine, ours, one in zip(*pairs, strict=True):
        np.testing.assert_array_equal(mine, ours)
        np.testing.assert_allclose(mine, one, rtol=1e-9, atol=1e-11)
    assert reported["epoch"] == 2
    assert reported["loss"] == pytest.approx(loss, rel=1e-9)
    assert noted(tmp_path, "both")["keras"].startswith("3.")
    assert noted(tmp_path, "both")["legacy"] is None
    assert [*(tmp_path / "storage" / "both").glob("checkpoint_*/latest.weights.h5")]


@pytest.mark.engines
def test_a_run_of_the_same_name_goes_on_to_the_same_bits(tmp_path):
    """Shuffled anew in each epoch; with a checkpoint in every second, and in the last."""
    straight, half, whole = train(
        tmp_path,
        {"name": "straight", "epochs": 3, "every": 2},
        {"name": "resumed", "epochs": 1},
        {"name": "resumed", "epochs": 3},
    )
    for mine, straightly in zip(
        saved(tmp_path, "resumed"), saved(tmp_path, "straight"), strict=True
    ):
        np.testing.assert_array_equal(mine, straightly)
    assert straight["epoch"] == whole["epoch"] == 3
    assert half["epoch"] == 1
    assert straight["loss"] == whole["loss"]
    assert noted(tmp_path, "straight")["epochs"] == [0, 1, 2]
    assert noted(tmp_path, "resumed", 1)["epochs"] == [1, 2]
    assert len([*(tmp_path / "storage" / "straight").glob("checkpoint_*/")]) == 2


@pytest.mark.engines
def test_a_worker_that_is_killed_is_started_again_and_training_ends_as_if_it_had_not(tmp_path):
    _, died = train(
        tmp_path,
        {"name": "straight", "epochs": 3},
        {"name": "killed", "epochs": 3, "dies": True},
    )
    assert (tmp_path / "died").exists()
    assert died["epoch"] == 3
    assert noted(tmp_path, "killed")["epochs"] == [1, 2]
    for mine, straightly in zip(
        saved(tmp_path, "killed"), saved(tmp_path, "straight"), strict=True
    ):
        np.testing.assert_array_equal(mine, straightly)


@pytest.mark.engines
def test_without_prepare_keras_3_does_not_train_by_ray(tmp_path):
    """What is mended: the control of the others."""
    (metrics,) = train(tmp_path, {"name": "unprepared", "epochs": 1, "prepared": False})
    assert "PerReplica" in metrics["error"] or "reduction" in metrics["error"]


@pytest.mark.engines
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_the_example_trains_and_goes_on_where_it_was(backend, tmp_path):
    example = ROOT / "examples" / "ray_train.py"
    for epochs in (6, 8):
        printed = program(
            *(example, "--backend", backend, "--epochs", epochs, "--storage", tmp_path / "s"),
            folder=tmp_path,
            backend=backend,
        )
        (line,) = re.findall(r"^epoch (\d+): accuracy ([\d.]+)", printed, re.MULTILINE)
        assert int(line[0]) == epochs
        # Each worker says the sum of its weights.
        assert len({*re.findall(r"weights ([-\d.]+)", printed)}) == 1
        reports = re.findall(r"Reporting training result \d+: .*?'epoch': (\d+)", printed)
        assert set(map(int, reports)) == ({1, 2, 3, 4, 5, 6} if epochs == 6 else {7, 8})
    assert float(line[1]) > 0.6


def test_outside_of_a_worker_it_says_where_it_belongs():
    from syncbn.integrations.ray import prepare

    with pytest.raises(NotSynchronizableError, match="train_loop_per_worker"):
        prepare()


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_a_number_of_epochs_that_cannot_be_is_refused(every):
    from syncbn.integrations.ray import ReportCheckpoint

    with pytest.raises(InputError, match="positive number of epochs"):
        ReportCheckpoint(every=every)


def test_a_trainer_of_another_framework_is_named(monkeypatch):
    from syncbn.integrations import ray as module

    monkeypatch.setattr(module, "_place", lambda: (0, 2))
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(NotSynchronizableError, match="Train by TensorflowTrainer"):
        module.prepare()


def test_without_ray_it_says_what_to_install(monkeypatch):
    from syncbn.integrations.ray import prepare

    monkeypatch.setitem(sys.modules, "ray.train", None)
    with pytest.raises(ModuleNotFoundError, match=r"syncbn\[ray\]"):
        prepare()


def test_the_rows_do_not_divide():
    assert on_ray.ROWS % on_ray.BATCH
    assert on_ray.BATCH % on_ray.WORKERS == 0
