"""`syncbn.verify` on workers: real processes, which import the function that makes the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.survival]

MODELS = """
import os
import keras, syncbn

def build(norm=syncbn.SyncBatchNormalization):
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4), norm(), keras.layers.Dense(1)]
    )
    model.compile("adam", "mse", metrics=["mae"])
    return model

def plain():
    return build(keras.layers.BatchNormalization)

def failing():
    if os.environ.get("RANK") == "1":
        raise OSError("no such disk")
    return build()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workers")
    (path / "models.py").write_text(MODELS)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(21, 5)), random.normal(size=(21, 1))
    np.savez(path / "data.npz", x=x.astype("float32"), y=y.astype("float32"))
    return path


def verified(folder: Path, function: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of the command with two workers and an uneven last batch."""
    options = ["--data", "data.npz", "--workers", "2", "--batch-size", "8", "--repair"]
    run = subprocess.run(
        [sys.executable, "-m", "syncbn", "verify", f"models:{function}", *options, "--json", "-"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode in {0, 1, 2}, run.stderr
    return run.returncode, json.loads(run.stdout)


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("build", 0, "2 workers trains as on one device"),
        ("plain", 1, "at batch_normalization: local normalization"),
        ("failing", 2, "no such disk"),
    ],
)
def test_workers_are_acquitted_convicted_and_heard(folder, function, code, words):
    found, report = verified(folder, function)
    assert found == code, report
    assert words in report["summary"]
    assert report["settings"]["workers"] == 2
