"""Models with parallel branches on two real workers: nobody waits for the wrong collective."""

import numpy as np
import pytest

from tests.multiprocess.cluster import run_workers
from tests.multiprocess.workers.branches import APPLICATIONS, STEPS

LAYERS = {"branches": 15} | {name: layers for name, (_, layers) in APPLICATIONS.items()}


def assert_trains_on_two_workers(name, folder):
    run_workers("tests.multiprocess.workers.branches", 2, [name, str(folder)], timeout=500)
    first, second = (np.load(folder / f"worker{index}.npz") for index in range(2))
    assert int(first["layers"]) == LAYERS[name]
    assert first["losses"].shape == (STEPS,)
    # Loss, weights and moving statistics: all of it, bit by bit.
    for field in first.files:
        assert np.isfinite(first[field]).all()
        np.testing.assert_array_equal(first[field], second[field])


@pytest.mark.models
@pytest.mark.multiprocess
def test_eight_branches_train_on_two_workers(tmp_path):
    assert_trains_on_two_workers("branches", tmp_path)


@pytest.mark.models
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", APPLICATIONS)
def test_a_branched_model_of_keras_applications_trains_on_two_workers(name, tmp_path):
    assert_trains_on_two_workers(name, tmp_path)
