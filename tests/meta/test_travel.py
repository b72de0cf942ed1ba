"""A `.keras` model trained on one backend goes on on another to the same weights."""

import numpy as np
import pytest
from tests.travel import BACKENDS, PRECISIONS, run

# Three backends start, and compile ten models each.
pytestmark = [pytest.mark.timeout(600), pytest.mark.frameworks]

# Relative to the largest weight; float32 rounds in another way on each of them.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("travel")
    run(folder)
    return folder


def weights(folder, name):
    with np.load(folder / f"{name}.npz") as stored:
        return [stored[key].astype("f8") for key in stored.files]


def distance(own, its):
    """The largest difference of a weight, relative to its largest value or 1."""
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1)) for a, b in zip(own, its, strict=True)
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("origin", BACKENDS)
def test_a_model_goes_on_on_another_backend_to_the_same_weights(folder, origin, target, precision):
    alone = weights(folder, f"{origin}-{precision}-alone")
    moved = weights(folder, f"{origin}-{precision}-on-{target}")
    assert distance(moved, alone) <= TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_on_changes_the_weights_and_what_is_not_loaded_is_noticed(
    folder, backend, precision
):
    """The control of the test above."""
    alone = weights(folder, f"{backend}-{precision}-alone")
    assert distance(weights(folder, f"{backend}-{precision}-half"), alone) > 1e-2
    forgetful = weights(folder, f"{backend}-{precision}-forgetful")
    assert distance(forgetful, alone) > 100 * TOLERANCE[precision]
