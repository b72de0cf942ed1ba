"""Training that survives: bitwise resumed, damaged backups refused, full disks outlived."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.multiprocess.cluster import run_processes
from tests.multiprocess.workers.resuming import CASES, DAMAGES, PREVIOUS

# A worker that is killed and resumed to the same bytes is a check of `syncbn selftest` too.
pytestmark = [pytest.mark.multiprocess, pytest.mark.survival]
TMPFS = ["unshare", "--mount", "--map-root-user"]


def may_mount():
    try:
        command = [*TMPFS, "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


def run(name, folder):
    command = [sys.executable, "-m", "tests.multiprocess.workers.resuming", name, str(folder)]
    ends = [0, -9 if name == "killed" else 0]
    command = [*TMPFS, *command] if name == "full" else command
    for index, (status, output) in enumerate(run_processes(command, 2, timeout=150, ends=ends)):
        assert status == ends[index], f"worker {index} ended with {status}:\n{output}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resuming")
    names = ["whole", "killed", "damaged", *(["full"] if may_mount() else [])]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: run(name, folder), names))
    run("resumed", folder)
    return folder


def found(folder, scenario, worker=0):
    return json.loads((folder / f"{scenario}{worker}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_training_has_the_bits_of_one_that_was_not_interrupted(folder, name):
    """By a program of another seed: whatever depends on chance is the backup's."""
    bits, epochs = found(folder, "whole")[name]
    assert epochs == [0, 1, 2]
    for worker in range(2):
        assert found(folder, "resumed", worker)[name] == [bits, [2]]


def test_a_training_of_which_a_worker_was_killed_has_the_same_bits(folder):
    assert found(folder, "killed")["error"] == "WorkerError"
    bits, _ = found(folder, "whole")["random"]
    for worker in range(2):
        assert found(folder, "resumed", worker)["killed"] == [bits, [2]]


def test_the_backup_is_deleted_at_the_end(folder):
    assert [found(folder, "resumed", worker)["left"] for worker in range(2)] == [[], []]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_an_error_on_every_worker_before_the_first_epoch(folder, damage):
    chief, other = (found(folder, "damaged", worker)[f"{damage} False"] for worker in range(2))
    kind, message = chief["error"]
    assert kind == "InputError"
    assert f"{damage} False" in message  # the folder's name
    assert "delete" in message
    assert chief["unchanged"]
    assert other["error"][0] == "WorkerError"
    assert message in other["error"][1]
    assert chief["epochs"] == other["epochs"] == []


@pytest.mark.parametrize("damage", sorted(PREVIOUS - {"another model"}))
def test_the_previous_backup_takes_the_place_of_a_damaged_one(folder, damage):
    for worker in range(2):
        result = found(folder, "damaged", worker)[f"{damage} True"]
        assert "error" not in result
        assert result["epochs"] == [1, 2]
        (warning,) = result["warnings"]
        assert "resumes from the previous one, of epoch 1" in warning


def test_two_backups_of_another_model_are_both_named(folder):
    result = found(folder, "damaged")["another model True"]
    assert result["error"][1].count("of another model or optimizer") == 2
    assert result["unchanged"]


def test_a_backup_of_keras_and_a_training_after_all_these_errors(folder):
    assert found(folder, "damaged")["of Keras"]["epochs"] == [2]
    assert found(folder, "damaged")["goes on"]["epochs"] == [0, 1, 2]


def test_a_file_in_place_of_the_folder_is_an_error_at_the_beginning(folder):
    chief, other = (found(folder, "damaged", worker)["a file"] for worker in range(2))
    assert "requires a folder that can be written to" in chief["error"][1]
    assert chief["error"][1] in other["error"][1]
    assert chief["epochs"] == other["epochs"] == []


@pytest.fixture
def full(folder):
    if not (folder / "full0.json").exists():
        pytest.skip("the kernel allows no mounts in a namespace of one's own")
    return found(folder, "full")


def test_a_full_disk_does_not_end_the_training_nor_the_backup_before(full):
    files = ["latest.weights.h5", "training_metadata.json"]
    assert full["states"] == [[epoch, files, True] for epoch in (1, 1, 1, 1, 5)]
    assert len(full["warnings"]) == 3
    for epoch, warning in enumerate(full["warnings"], 2):
        assert f"The backup of epoch {epoch} could not be written to" in warning
        assert "No space left on device. It needs " in warning
        assert "that of epoch 1 stands" in warning
    assert "and 40960 are free" in full["warnings"][0]


def test_a_folder_for_which_there_is_no_room_is_made_later(full):
    (warning,) = full["mkdir"]
    assert "The backup of epoch 1 could not be written" in warning
    assert "there is none" in warning
    assert full["made"] == ["latest.weights.h5", "training_metadata.json"]
