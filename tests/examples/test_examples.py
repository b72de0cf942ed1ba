"""The examples do what their first lines claim, run as a stranger runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def run(folder, *command, seconds=280):
    """What the command prints; in a folder of its own, with no cluster around it."""
    clean = {k: v for k, v in os.environ.items() if k != "TF_CONFIG" and "SYNCBN" not in k}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**clean, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def numbers(pattern, text):
    """Every number that the pattern's group finds."""
    found = [float(number) for number in re.findall(pattern, text)]
    assert found, text
    return found


@pytest.mark.engines
def test_one_machine_shows_that_the_plain_layer_is_local_and_ours_is_not(tmp_path):
    printed = run(tmp_path, FOLDER / "one_machine.py")
    local, synchronized = numbers(r"Δ to one device (\S+),", printed)
    assert local > 1e-2
    assert synchronized < 1e-10
    local, synchronized = numbers(r"apart by (\S+)", printed)
    assert local > 1e-3
    assert synchronized == 0


@pytest.mark.multiprocess
def test_several_workers_train_what_one_device_trains(tmp_path):
    program = FOLDER / "several_workers.py"
    printed = run(tmp_path, "-m", "syncbn", "launch", "--workers", "2", program, "--epochs", "1")
    assert printed.count("2 replicas on 2 workers") == 2, printed
    assert max(numbers(r"Δ to one device (\S+)", printed)) < 1e-9


@pytest.mark.engines
def test_a_layer_and_a_loop_of_ones_own_train_what_one_device_trains(tmp_path):
    printed = run(tmp_path, FOLDER / "custom_layer.py", "--steps", "12")
    assert numbers(r"any weight: (\S+)", printed)[0] < 1e-10
    one_device, replicas = re.findall(r"loss (.*)", printed)
    assert one_device == replicas


def _iou(printed):
    ends = dict(re.findall(r"^(.*): median IoU (\S+)", printed, re.MULTILINE))
    return {kind: float(value) for kind, value in ends.items()}


@pytest.mark.engines
def test_segmentation_needs_statistics_of_all_replicas(tmp_path):
    iou = _iou(run(tmp_path, FOLDER / "segmentation.py", "--quick"))
    assert iou["synchronized"] > iou["local"] + 0.1
    assert iou["synchronized"] == pytest.approx(iou["one device"], abs=0.05)
    assert (tmp_path / "segmentation.png").stat().st_size > 10_000


def _converted(printed):
    synchronized, local = numbers(r"replicas: (\S+) from one device", printed)
    assert synchronized < 1e-3
    assert local > 0.1
    assert "syncbn needed: False" in printed
    assert numbers(r"answers off by (\S+)", printed)[0] < 1e-12  # float64: sums in another order


@pytest.mark.engines
def test_a_converted_application_trains_what_one_device_trains(tmp_path):
    printed = run(tmp_path, FOLDER / "convert_applications.py")
    assert "52 layers -> SyncBatchNormalization" in printed
    before, after = numbers(r"([\d.]+) (?:by the moving averages|recalibrated)", printed)
    assert after < before
    _converted(printed)


@pytest.mark.engines
def test_a_smaller_converted_application_trains_what_one_device_trains(tmp_path):
    options = ("--model", "MobileNet", "--examples", "50")
    printed = run(tmp_path, FOLDER / "convert_applications.py", *options)
    assert "27 layers -> SyncBatchNormalization" in printed
    _converted(printed)


@pytest.mark.engines
def test_segmentation_at_length_shows_what_its_picture_shows(tmp_path):
    iou = _iou(run(tmp_path, FOLDER / "segmentation.py", "--seeds", "2"))
    assert iou["synchronized"] > iou["local"] + 0.1
