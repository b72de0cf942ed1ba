"""MultiWorkerMirroredStrategy over real processes, in a custom loop."""

import numpy as np
import pytest

from tests.harness import Observed, assert_equals_one_device
from tests.multiprocess.cluster import run_workers
from tests.multiprocess.workers.cases import CASES, COLLECTIVES

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    run_workers("tests.multiprocess.workers.equivalence", 2, [str(folder)], timeout=200)
    return [np.load(folder / f"worker{index}.npz") for index in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_workers_give_what_one_device_gives(workers, name):
    case, _ = CASES[name]
    observed = Observed(
        *([worker[f"{name}/{field}"] for worker in workers] for field in Observed._fields[:-1])
    )
    tolerance = {"float32": 2e-6, "float64": 1e-11}[case.parts[0].dtype.name]
    assert_equals_one_device(case, observed, tolerance)


@pytest.mark.parametrize("name", [name for name, (_, mode) in CASES.items() if mode == "graph"])
def test_each_worker_issues_one_collective_each_way(workers, name):
    assert [int(worker[f"{name}/collectives"]) for worker in workers] == [COLLECTIVES[name]] * 2


def test_a_nan_on_one_worker_stops_both_with_the_same_words(workers):
    """None is left waiting for a peer that has stopped."""
    for worker in workers:
        assert "Received: NaN or infinity in replica 1: its input." in str(worker["stopped"])
