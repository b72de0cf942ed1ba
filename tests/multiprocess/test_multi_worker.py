"""MultiWorkerMirroredStrategy over real processes, in a custom loop."""

import numpy as np
import pytest

from tests import recalibration
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


@pytest.mark.parametrize("repaired", [False, True])
def test_two_workers_recalibrate_a_model_as_one_device_does_to_the_same_bits(workers, repaired):
    x = np.concatenate(recalibration.data())
    assert len(x) % 9 == 1  # the last batch leaves a worker without an example
    wanted = recalibration.expected(np.split(x, range(9, len(x), 9)))
    for layer, statistics in enumerate(wanted):
        for name, its in (("mean", statistics.mean), ("variance", statistics.variance)):
            first, second = (w[f"recalibrated/{repaired}/{layer}/{name}"] for w in workers)
            assert first.tobytes() == second.tobytes()
            np.testing.assert_allclose(first, its, rtol=1e-11, atol=1e-11)
