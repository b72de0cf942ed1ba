"""`syncbn train --strategy multiworker`: the same job, trained by processes."""

import csv
import json
import os
import re
import signal

import keras
import numpy as np
import pytest
from tests.cli.jobs import Job, in_this_process

from syncbn.training import data

pytestmark = pytest.mark.multiprocess

FILES = ["curves.png", "history.csv", "model.keras", "table.json"]
WORKERS = ("--strategy", "multiworker", "--workers")


def finished(tmp_path, *arguments):
    """Run a job to its end; its folder and what it printed."""
    started = Job(tmp_path, *arguments, "--output", str(tmp_path / "out"))
    ended = started.end(120)
    assert ended.returncode == 0, ended.stderr
    assert started.worker_pids() == []
    return tmp_path / "out", ended


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    # 1437 = 44 · 32 + 29: the last batch is 16 + 13.
    arguments = ("--compare", "--precision", "float64", "--epochs", "1")
    return finished(tmp_path_factory.mktemp("compared"), *WORKERS, "2", *arguments)


def test_the_table_shows_sync_at_one_device_and_local_far_off(compared):
    table = json.loads((compared[0] / "table.json").read_text())
    rows = {row["run"]: row for row in table["rows"]}
    assert list(rows) == [
        *("one device", "sync × 2 workers", "reordered"),
        *("local × 2 workers", "keras × 2 workers"),
    ]
    for part in ("weights", "moving_statistics"):
        # Adam amplifies rounding: "reordered" is at 1e-12 itself.
        assert rows["sync × 2 workers"]["difference"][part] < 1e-11
        assert rows["keras × 2 workers"]["difference"][part] < 1e-11
        assert rows["local × 2 workers"]["difference"][part] > 1e-3
    reference = rows["one device"]
    for score in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
        assert rows["sync × 2 workers"][score] == pytest.approx(reference[score], abs=1e-11)


def test_the_reference_is_what_one_device_gives_without_workers(compared):
    (row, *_) = json.loads((compared[0] / "table.json").read_text())["rows"]
    epoch = in_this_process(precision="float64", epochs=1)
    assert (row["train_loss"], row["test_loss"]) == pytest.approx(
        (epoch.train.loss, epoch.test.loss), abs=1e-12
    )


def test_the_files_are_those_of_any_job(compared):
    folder, _ = compared
    assert sorted(path.name for path in folder.iterdir()) == FILES
    with (folder / "history.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 5
    model = keras.models.load_model(folder / "model.keras")
    digits = data.load("digits")
    right = model.predict(digits.x_test, verbose=0).argmax(axis=-1) == digits.y_test
    row = json.loads((folder / "table.json").read_text())["rows"][1]
    assert right.mean() == pytest.approx(row["test_accuracy"], abs=1e-6)


def test_the_chief_shows_a_bar_for_each_run_and_the_parent_prints_one_table(compared):
    _, ended = compared
    bars = re.findall(r"^(\[\d\])? ?(\S+(?: \S+)*) +━+ 45/45 steps", ended.stderr, re.MULTILINE)
    assert bars == [
        *(("[0]", f"{norm} × 2 workers") for norm in ("sync", "local", "keras")),
        *(("", "one device"), ("", "reordered")),
    ]
    assert ended.stdout.count("Δ weights") == 1
    assert "[0]" not in ended.stdout
    assert max(len(line) for line in ended.stdout.splitlines() if "│" in line) <= 80
    assert "I0000" not in ended.stderr
    assert "Traceback" not in ended.stderr


def small_data(path, images):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, images)
    y[:2] = 0, 1
    x = (rng.normal(size=(images, 6, 7)) + y[:, None, None]).astype("f4")
    np.savez(path, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    return x, y


@pytest.mark.scenarios
def test_workers_whose_last_parts_are_empty_end_at_the_weights_of_one_device(tmp_path):
    small_data(tmp_path / "d.npz", 37)  # 3 · 12 + 1: 1, 0 and 0
    common = {"data": str(tmp_path / "d.npz"), "optimizer": "sgd"}
    numbers = {"batch_size": 12, "epochs": 2, "seed": 3, "precision": "float64"}
    options = [
        text
        for name, value in {**common, **numbers}.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    folder, _ = finished(tmp_path, *WORKERS, "3", *options)
    model = keras.models.load_model(folder / "model.keras")
    one = in_this_process(**common, **numbers)
    for own, its in zip(model.get_weights(), one.weights, strict=True):
        np.testing.assert_allclose(own, its, rtol=0, atol=1e-12)


@pytest.mark.scenarios
def test_an_overflow_on_the_second_worker_skips_the_step_on_both(tmp_path):
    x, y = small_data(tmp_path / "d.npz", 32)
    order = np.random.default_rng(0).permutation(32)
    x[order[6]] = 1e30  # infinite in float16, in the second half of the first batch of 8
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:1], y_test=y[:1])
    folder, _ = finished(
        tmp_path,
        *(*WORKERS, "2", "--data", str(tmp_path / "d.npz"), "--norm", "local"),
        *("--precision", "mixed_float16", "--batch-size", "8", "--epochs", "1"),
    )
    model = keras.models.load_model(folder / "model.keras")
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


PROCESSES = pytest.mark.parametrize(
    ("options", "name"),
    [
        pytest.param((*WORKERS, "2"), "sync × 2 workers", id="workers"),
        pytest.param(("--backend", "torch"), "sync × 2", id="torch", marks=pytest.mark.frameworks),
    ],
)


@pytest.mark.survival
@PROCESSES
def test_ctrl_c_keeps_the_finished_epochs_exits_130_and_leaves_no_process(tmp_path, options, name):
    folder = tmp_path / "out"
    started = Job(tmp_path, *options, "--epochs", "10000", "--output", str(folder))
    started.wait_for(lambda: any(tmp_path.glob("syncbn-job-*/run-0-epoch-2.npz")))
    started.process.send_signal(signal.SIGINT)
    ended = started.end()
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "kept the finished epochs of 1 run(s)" in ended.stderr
    assert sorted(path.name for path in folder.iterdir()) == FILES
    (row,) = json.loads((folder / "table.json").read_text())["rows"]
    assert (row["run"], row["replicas"]) == (name, 2)
    assert 2 <= row["epochs"] < 10000
    assert started.worker_pids() == []
    assert list(tmp_path.glob("syncbn-job-*")) == []


@pytest.mark.survival
@PROCESSES
def test_a_worker_that_is_killed_gives_its_exit_code_and_keeps_the_finished_epochs(
    tmp_path, options, name
):
    folder = tmp_path / "out"
    started = Job(tmp_path, *options, "--epochs", "10000", "--output", str(folder))
    started.wait_for(lambda: any(tmp_path.glob("syncbn-job-*/run-0-epoch-1.npz")))
    workers = started.worker_pids()
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    ended = started.end()
    assert ended.returncode == 128 + signal.SIGKILL
    (*_, error, last) = ended.stderr.strip().splitlines()
    kind = "workers" if "workers" in name else "replicas"
    assert error.startswith(f"syncbn: error: training on 2 {kind} requires that all of them end")
    assert "exit code 137" in error
    assert last == "syncbn: not finished, kept the finished epochs of 1 run(s)"
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert started.worker_pids() == []
