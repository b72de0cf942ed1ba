"""Workers that part: one evaluates, stops, writes, fails, sleeps or dies alone."""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tests.multiprocess.cluster import run_workers

pytestmark = [pytest.mark.multiprocess, pytest.mark.survival]
KILLED = {"together": None, "killed": 1, "chief killed": 0, "failed": None, "late": None}
# For trying what each test finds: names of repairs that are left out.
WITHOUT = os.environ.get("SYNCBN_TEST_WITHOUT", "").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where every pair of workers has been. Mostly they wait, so that all run at a time."""
    folder = tmp_path_factory.mktemp("apart")

    def run(name):
        arguments = [name, str(folder), *WITHOUT]
        script = "tests.multiprocess.workers.apart"
        return run_workers(script, 2, arguments, timeout=100, killed=KILLED[name])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, KILLED))
    return folder


def found(folder: Path, scenario: str, worker: int):
    return json.loads((folder / f"{scenario}{worker}.json").read_text())


@pytest.fixture(scope="module")
def workers(folder):
    return [SimpleNamespace(found=found(folder, "together", index)) for index in range(2)]


def outcomes(workers, name):
    return [worker.found[name]["outcome"] for worker in workers]


def errors(workers, name):
    return [outcome["error"] for outcome in outcomes(workers, name)]


def test_the_board_gives_the_chiefs_value_and_everyones(workers):
    assert [worker.found["agree"] for worker in workers] == [10, 10]
    assert [worker.found["exchange"] for worker in workers] == [["from 0", "from 1"]] * 2


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("stop by one", [0, 1, 2]),
        ("stop by all", [0, 1]),
        ("stop by one at the last step", [0, 1, 2, 3]),
        ("stop by one at the end of an epoch", [0, 1, 2, 3]),
        ("stop by NaN", [0, 1, 2]),
    ],
)
def test_all_workers_stop_after_the_same_step(workers, name, steps):
    """After the one in which it was asked for, as one device, or one later where one asked."""
    assert outcomes(workers, name) == [steps, steps]


def test_callbacks_of_all_workers_may_evaluate_and_read_metrics(workers):
    first, second = outcomes(workers, "callbacks of all")
    assert len(first) == 2
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("call", ["evaluate", "predict", "train_on_batch", "metric"])
def test_what_the_chief_calls_alone_raises_at_once_on_both(workers, call):
    chief, other = errors(workers, f"{call} alone")
    assert "requires all 2 workers: call it on every worker" in chief
    assert "another is at the end of epoch 1: worker 1 (127.0.0.1:" in chief
    assert "in callback Calls.on_the_moment (line" in chief
    assert "worker 0 (127.0.0.1:" in other
    assert all(worker.found[f"{call} alone"]["seconds"] < 3 for worker in workers)


def test_what_the_chief_calls_alone_within_an_epoch_raises_soon_on_both(workers):
    chief, other = errors(workers, "evaluate alone within an epoch")
    assert "it has gone past this place: worker 1" in chief
    assert "training step 2 of epoch 1" in chief
    assert "worker 0" in other
    assert "ended this operation by WorkerError" in other
    seconds = [w.found["evaluate alone within an epoch"]["seconds"] for w in workers]
    assert seconds[0] < 3
    assert seconds[1] < 5


def test_other_numbers_of_epochs_are_refused_at_the_entry(workers):
    for error in errors(workers, "epochs differ"):
        assert "{'epochs': 1" in error
        assert "{'epochs': 2" in error


def test_workers_go_on_after_errors_at_the_same_place(workers):
    assert outcomes(workers, "after all that") == [4, 4]


def test_the_chief_alone_writes_and_every_file_is_whole(folder, workers):
    assert outcomes(workers, "checkpoints") == [8, 8]
    # Each by a rename, which is one moment.
    names = {"1.weights.h5", "2.weights.h5", "best.keras"}
    assert names <= set(workers[0].found["written"])
    assert workers[1].found["written"] == []
    assert not workers[1].found["opened the log"]
    assert workers[0].found["best"] == workers[1].found["best"]
    shared = folder / "shared"
    assert {path.name for path in shared.iterdir()} == {*names, "log.csv"}
    assert [
        row["epoch"] for row in csv.DictReader((shared / "log.csv").read_text().splitlines())
    ] == ["0", "1"]
    assert keras.models.load_model(shared / "best.keras").count_params() == 21


def test_the_chiefs_backup_is_everyones(workers):
    """The second worker has no backup of its own, and began from other weights."""
    assert workers[0].found["backup"] == ["latest.weights.h5", "training_metadata.json"]
    assert workers[1].found["backup"] == []
    assert [worker.found["restored"] for worker in workers] == [True, True]
    assert outcomes(workers, "resumed") == [[0, 1, 2, 3] * 2] * 2


@pytest.mark.parametrize(("scenario", "survivor"), [("killed", 0), ("chief killed", 1)])
def test_a_worker_that_is_killed_is_named_in_seconds(folder, scenario, survivor):
    result = found(folder, scenario, survivor)["fit"]
    assert f"worker {1 - survivor} (127.0.0.1:" in result["outcome"]["error"]
    assert "gone" in result["outcome"]["error"]
    assert f"This is worker {survivor}" in result["outcome"]["error"]
    assert result["outcome"]["cause"].endswith("Error")
    assert result["seconds"] < 15


def test_a_worker_that_fails_ends_the_others_with_its_reason(folder):
    assert found(folder, "failed", 1)["own error"] == "no table of labels"
    result = found(folder, "failed", 0)["fit"]
    assert "ended this operation by LookupError: no table of labels" in result["outcome"]["error"]
    assert result["seconds"] < 15


def test_a_worker_that_is_late_is_named_with_what_it_does_meanwhile(folder):
    result = found(folder, "late", 0)["fit"]
    assert result["outcome"]["cause"] == "UnavailableError"  # aborted by the watching thread
    assert "worker 1" in result["outcome"]["error"]
    assert "is alive, last seen at training step 3 of epoch 1" in result["outcome"]["error"]
    assert "in callback Calls.on_the_moment (line" in result["outcome"]["error"]
    assert "worker 0" in found(folder, "late", 1)["fit"]["outcome"]["error"]
