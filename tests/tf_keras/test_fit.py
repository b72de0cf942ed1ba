"""tf_keras's fit on replicas and on workers gives what it gives on one device."""

import numpy as np
import pytest
import tf_keras

from tests.harness import assert_close
from tests.multiprocess.cluster import run_workers
from tests.replicas.tensorflow import mirrored_strategy
from tests.tf_keras import fitting

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "mixed_bfloat16": 0.05}


@pytest.fixture(scope="module", params=TOLERANCE)
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def one_device(precision):
    return fitting.fitted(precision)


def assert_fits_are_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, found[name], value, tolerance)


def test_fit_on_replicas_gives_what_one_device_gives(precision, one_device):
    """Seven examples on two replicas, of which the last batch has three."""
    found = fitting.fitted(precision, mirrored_strategy(2))
    assert_fits_are_equal(found, one_device, TOLERANCE[precision])


def test_fit_with_plain_layers_does_not_and_the_comparison_sees_it():
    layer = tf_keras.layers.BatchNormalization
    expected = fitting.fitted("float64", layer_class=layer)
    found = fitting.fitted("float64", mirrored_strategy(2), layer_class=layer)
    with pytest.raises(AssertionError, match="off by"):
        assert_fits_are_equal(found, expected, 1e-3)


@pytest.mark.multiprocess
def test_fit_on_two_workers_gives_what_one_device_gives(tmp_path):
    """And what they save and load is the same, bit for bit."""
    run_workers("tests.tf_keras.fitting", 2, [str(tmp_path)], timeout=150)
    results = [dict(np.load(tmp_path / f"worker{index}.npz")) for index in range(2)]
    expected = fitting.fitted("float64")
    for found in results:
        assert len(found) == 3 * len(expected)
        for name, value in found.items():
            trained = results[0]["weight " + name.rsplit(" ", maxsplit=1)[1]]
            assert value.tobytes() == trained.tobytes(), name
    trained = {name: results[0][name] for name in expected}
    assert_fits_are_equal(trained, expected, TOLERANCE["float64"])
