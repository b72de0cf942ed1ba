"""Trains under a process manager, and compares with what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.multiprocess.cluster import ROOT, Ended

TRAINED = "tests.multiprocess.workers.trained"


def missing(what: str) -> None:
    """Skip; where the environment has CI, fail, so that nobody takes the tests for passed."""
    said = f"the launcher is tried under real process managers, and there is no {what}"
    if os.environ.get("CI"):
        pytest.fail(f"{said} (Debian: apt-get install slurm-wlm munge openmpi-bin)")
    pytest.skip(said)


def environment(backend: str = "tensorflow") -> dict[str, str]:
    """In which the program is found, and Keras takes the backend."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "KERAS_BACKEND": backend,
    }


def command(folder: Path, *options: str, ends: str = "") -> list[str]:
    """The launcher with the training that leaves its weights in the folder."""
    program = ["-m", TRAINED, str(folder), *([ends] if ends else [])]
    return [sys.executable, "-m", "syncbn", "launch", *options, *program]


def assert_trained_as_one(ended: Ended, folder: Path, backend: str, workers: int = 2) -> None:
    """Every worker holds the same bits, and those are one process's but for rounding."""
    assert ended.status == 0, ended.output
    found = [np.load(folder / f"{rank}-of-{workers}.npz") for rank in range(workers)]
    alone = _alone(folder, backend)
    assert len(alone) == len(found[0].files) == 7
    for name, wanted in zip(found[0].files, alone, strict=True):
        assert len({one[name].tobytes() for one in found}) == 1, name
        np.testing.assert_allclose(found[0][name], wanted, rtol=2e-6, atol=2e-6)


def _alone(folder: Path, backend: str) -> list[np.ndarray]:
    if backend == "tensorflow":  # as this process has it
        from tests.multiprocess.workers import trained

        return trained.on_processes(*trained.data(), []).get_weights()
    subprocess.run(
        [sys.executable, "-m", TRAINED, str(folder)],
        env=environment(backend),
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    weights = np.load(folder / "0-of-1.npz")
    return [weights[name] for name in weights.files]
