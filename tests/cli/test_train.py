"""`syncbn train` as a user runs it: results, bad input, Ctrl-C."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from PIL import Image

import syncbn
from syncbn.cli import main

FILES = ["curves.png", "history.csv", "model.keras", "table.json"]
WORKERS = ("--strategy", "multiworker")


def command(*arguments):
    return [sys.executable, "-m", "syncbn", "train", *arguments]


def run(*arguments, timeout=200, **environment):
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "out"
    result = run("--compare", "--epochs", "2", "--precision", "float64", "--output", str(folder))
    assert result.returncode == 0, result.stderr
    return result, folder


def test_it_leaves_the_four_files_and_nothing_else(compared):
    assert sorted(path.name for path in compared[1].iterdir()) == FILES


def test_the_table_shows_sync_at_one_device_and_local_far_off(compared):
    table = json.loads((compared[1] / "table.json").read_text())
    rows = {row["run"]: row for row in table["rows"]}
    assert list(rows) == ["one device", "sync × 2", "reordered", "local × 2", "keras × 2"]
    assert table["settings"]["precision"] == "float64"
    for part in ("weights", "moving_statistics"):
        assert rows["sync × 2"]["difference"][part] < 1e-9
        assert rows["local × 2"]["difference"][part] > 1e-3
    assert rows["one device"]["difference"] is None
    assert rows["sync × 2"]["test_accuracy"] > 0.8


def test_the_terminal_shows_the_table_and_where_the_files_are(compared):
    result, folder = compared
    for text in ("one device", "sync × 2", "local × 2", "Δ weights", str(folder / "model.keras")):
        assert text in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if "│" in line) <= 80
    assert "Traceback" not in result.stderr
    assert "oneDNN" not in result.stderr


def test_the_history_has_a_line_for_each_epoch_of_each_run(compared):
    with (compared[1] / "history.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 2
    assert {line["epoch"] for line in lines} == {"1", "2"}
    assert all(float(line["loss"]) > 0 for line in lines)


def test_the_saved_model_is_the_trained_one_and_synchronized(compared):
    from syncbn.training import data

    model = keras.models.load_model(compared[1] / "model.keras")
    assert any(isinstance(layer, syncbn.SyncBatchNormalization) for layer in model.layers)
    digits = data.load("digits")
    right = model.predict(digits.x_test, verbose=0).argmax(axis=-1) == digits.y_test
    row = json.loads((compared[1] / "table.json").read_text())["rows"][1]
    assert right.mean() == pytest.approx(row["test_accuracy"], abs=1e-6)


def test_the_picture_is_drawn(compared):
    with Image.open(compared[1] / "curves.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.models
def test_convnet_on_a_file_with_more_replicas_than_the_last_batch_has_images(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 37)
    x = (rng.normal(size=(37, 6, 7)) + 3 * y[:, None, None]).astype("f4")
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    result = run(
        *("--data", str(tmp_path / "d.npz"), "--model", "convnet", "--replicas", "4"),
        *("--batch-size", "12", "--epochs", "1", "--output", str(tmp_path / "out")),
        *("--optimizer", "sgd", "--learning-rate", "0.01", "--precision", "mixed_bfloat16"),
    )
    assert result.returncode == 0, result.stderr
    model = keras.models.load_model(tmp_path / "out" / "model.keras")
    normalizations = [w for w in model.layers if isinstance(w, keras.layers.BatchNormalization)]
    assert len(normalizations) >= 9
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/file.npz"], "is not a file"),
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--replicas", "4", "--batch-size", "3"], "--batch-size 3 for --replicas 4"),
        (["--workers", "3"], "--workers is of --strategy multiworker. Received: --workers with"),
        (["--strategy", "none", "--replicas", "3"], "--replicas is of --strategy mirrored"),
        ([*WORKERS, "--replicas", "3"], "give --workers instead"),
        ([*WORKERS, "--workers", "0"], "--workers must be at least 1"),
        ([*WORKERS, "--workers", "4", "--batch-size", "3"], "--batch-size 3 for --workers 4"),
        ([*WORKERS, "--data", "no/such/file.npz"], "is not a file"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "1000000000000000000000"], "--batch-size must be at least 1 and at most"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--model", "transformer"], "invalid choice: 'transformer'"),
        (["--optimizer", "sdg"], "--optimizer must be the name"),
        (["--learning-rate", "-1"], "--learning-rate must be a positive number"),
        (["--learning-rate", "nan"], "--learning-rate must be a positive number"),
        (["--seed", "-1"], "--seed must be"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_output(arguments, message, tmp_path, capsys):
    folder = tmp_path / "out"
    try:
        code = main(["train", *arguments, "--output", str(folder)])
    except SystemExit as error:
        code = error.code
    printed, said = capsys.readouterr()
    assert code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1, said
    assert printed == ""
    assert not folder.exists()


def test_an_output_that_is_a_file_is_refused_before_training(tmp_path):
    (tmp_path / "out").write_text("mine")
    result = run("--output", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "--output must be a folder" in result.stderr
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_whose_files_cannot_be_replaced_is_refused_before_training(tmp_path):
    (tmp_path / "model.keras").mkdir()
    result = run("--output", str(tmp_path))
    assert result.returncode == 2
    assert "model.keras in it is a folder" in result.stderr


def test_diverged_training_is_reported_in_valid_json(tmp_path):
    arguments = ("--learning-rate", "1e30", "--optimizer", "sgd", "--epochs", "1")
    result = run(
        *arguments, "--strategy", "none", "--batch-size", "1000", "--output", str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "table.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["rows"][0]["test_loss"] is None


def interrupted(folder, condition):
    """Start a job far too long, interrupt it once the condition holds; exit code and output."""
    arguments = command("--epochs", "10000", "--compare", "--output", str(folder))
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not condition(process) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return process.returncode, stdout, stderr


@pytest.mark.survival
def test_ctrl_c_keeps_the_finished_epochs_and_exits_130(tmp_path):
    folder = tmp_path / "out"
    start = time.monotonic()

    def has_trained_for_a_while(_):
        # The folder is made when training begins; an epoch of the digits takes half a second.
        nonlocal start
        if not folder.exists():
            start = time.monotonic()
        return time.monotonic() - start > 12

    code, stdout, stderr = interrupted(folder, has_trained_for_a_while)
    assert code == 130, stderr
    assert "Traceback" not in stderr
    assert sorted(path.name for path in folder.iterdir()) == FILES
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["sync × 2"]
    assert 1 <= rows[0]["epochs"] < 10000
    assert "sync × 2" in stdout
    keras.models.load_model(folder / "model.keras")


def test_ctrl_c_before_the_first_epoch_leaves_nothing_and_exits_130(tmp_path):
    folder = tmp_path / "out"
    start = time.monotonic()
    code, _, stderr = interrupted(folder, lambda _: time.monotonic() - start > 1.5)
    assert code == 130, stderr
    assert "Traceback" not in stderr
    assert not folder.exists() or list(folder.iterdir()) == []
