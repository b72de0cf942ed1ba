"""`syncbn train --backend jax` and `torch`: the main job there, and what is said where it is not.

Under TensorFlow, whose own job gives the expected losses; the other two run in processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.cli.jobs import Job, in_this_process
from tests.processes import python

FILES = ["curves.png", "history.csv", "model.keras", "table.json"]
# 37 = 3 · 12 + 1: 4 devices do not divide the last batch, of which the second process gets nothing.
SETTINGS = {"optimizer": "sgd", "batch_size": 12, "epochs": 2, "precision": "float64"}


def without_tensorflow(folder):
    """What keeps processes from it, where Keras would load it to save a model."""
    (folder / "tensorflow.py").write_text("raise ModuleNotFoundError(name='tensorflow')")
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), inherited]))}


def finished(folder, *arguments):
    """The rows of a comparison by name, and the last epoch on one device with TensorFlow."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 37)
    y[:2] = 0, 1
    x = (rng.normal(size=(37, 6, 7)) + y[:, None, None]).astype("f4")
    path = folder / "d.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    options = [
        text
        for name, value in {"data": path, **SETTINGS}.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    options += ["--compare", "--output", str(folder / "out")]
    job = Job(folder, *arguments, *options, **without_tensorflow(folder))
    ended = job.end(200)
    assert ended.returncode == 0, ended.stderr
    assert job.worker_pids() == []
    assert sorted(file.name for file in (folder / "out").iterdir()) == FILES
    assert max(len(line) for line in ended.stdout.splitlines() if "│" in line) <= 80
    for notice in ("Traceback", "oneDNN", "c10d", "Warning"):
        assert notice not in ended.stderr
    rows = json.loads((folder / "out" / "table.json").read_text())["rows"]
    return {row["run"]: row for row in rows}, in_this_process(data=str(path), **SETTINGS)


def differences(row):
    return row["difference"]["weights"], row["difference"]["moving_statistics"]


def losses(row):
    return row["train_loss"], row["test_loss"]


@pytest.mark.frameworks
@pytest.mark.multiprocess
def test_on_jax_sync_is_at_one_device_whose_figures_are_those_on_tensorflow(tmp_path):
    rows, expected = finished(tmp_path, "--backend", "jax", "--replicas", "4")
    assert list(rows) == ["one device", "sync × 4", "reordered", "local × 4", "keras × 4"]
    assert max(differences(rows["sync × 4"])) < 1e-12
    assert min(differences(rows["local × 4"])) > 1e-3
    # Keras's layer is global there, but in float32.
    assert 1e-12 < max(differences(rows["keras × 4"])) < 1e-4
    # In inference Keras's layer is in float32 in any case.
    assert losses(rows["sync × 4"]) == pytest.approx(losses(rows["one device"]), abs=1e-12)
    assert rows["one device"]["train_loss"] == pytest.approx(expected.train.loss, abs=1e-12)
    assert rows["one device"]["test_loss"] == pytest.approx(expected.test.loss, abs=1e-5)


@pytest.mark.frameworks
@pytest.mark.multiprocess
def test_on_torch_sync_is_at_one_device_whose_figures_are_those_on_tensorflow(tmp_path):
    rows, expected = finished(tmp_path, "--backend", "torch")
    assert list(rows) == ["one device", "sync × 2", "reordered", "local × 2"]
    # Keras's Dense computes in float32 there.
    assert max(differences(rows["sync × 2"])) < 1e-6
    # Without a single example Keras's layer makes NaN of its moving statistics.
    assert not min(d or np.inf for d in differences(rows["local × 2"])) < 1e-3
    expected_losses = (expected.train.loss, expected.test.loss)
    assert losses(rows["one device"]) == pytest.approx(expected_losses, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "backend", "message"),
    [
        (["--backend", "mxnet"], "", "invalid choice: 'mxnet'"),
        ([], "numpy", "Received: the environment variable KERAS_BACKEND=numpy. Unset it"),
        (["--backend", "jax"], "torch", "Received: --backend jax with KERAS_BACKEND=torch. Leave"),
        (
            ["--strategy", "mirrored"],
            "jax",
            "one of data_parallel, none on the backend jax",
        ),
        (["--backend", "torch", "--strategy", "multiworker"], "", "Received: multiworker. Choose"),
        (["--strategy", "data_parallel"], "", "multiworker, none on the backend tensor"),
        (["--backend", "torch", "--norm", "keras"], "", "--norm must be one of sync, local on"),
        (["--backend", "torch", "--workers", "3"], "", "--workers is of --strategy multiworker"),
        (["--backend", "jax", "--replicas", "64"], "", "--batch-size 32 for --replicas 64"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(arguments, backend, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "syncbn", "train", *arguments, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "KERAS_BACKEND": backend},
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "out").exists()


MISSING = """
import sys

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == {backend!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing)
import syncbn
from syncbn.cli import main

sys.stderr = sys.stdout
print(main(["train", "--backend", {backend!r}]))
try:
    syncbn.SyncBatchNormalization
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_a_missing_framework_is_one_line_that_names_the_extra(backend):
    error, code, of_layer = python(
        MISSING.format(backend=backend), KERAS_BACKEND=backend
    ).splitlines()
    assert error.endswith(f"no such package. Install it: pip install 'syncbn[{backend},train]'.")
    assert code == "2"
    assert of_layer.startswith(f"syncbn.SyncBatchNormalization requires the package {backend}.")
    assert f"pip install 'syncbn[{backend}]'" in of_layer


def test_the_training_knows_no_framework():
    folder = Path(__file__).parents[2] / "src" / "syncbn" / "training"
    for path in folder.glob("*.py"):
        for backend in ("tensorflow", "jax", "torch"):
            assert f"_backends.{backend}" not in path.read_text(), path
