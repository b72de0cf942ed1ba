"""`syncbn.average_gradients`: Keras's `fit` by two processes gives what one gives on all data."""

import functools
import json
import sys

import keras
import numpy as np
import pytest
from tests.multiprocess.cluster import run_processes
from tests.torch import fitting
from torch import distributed

import syncbn

# Compiled it is the same step, after a minute of compiling.
TOGETHER = ["eager", pytest.param("compiled", marks=pytest.mark.frameworks)]


EAGER = ["eager", "local", "apart", "outside", "fewer"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process has found, run when the first test asks for it."""
    folder = tmp_path_factory.mktemp("fitting")
    command = [sys.executable, "-m", "tests.torch.fitting", str(folder)]

    @functools.cache
    def run(*hows):
        for status, output in run_processes([*command, *hows], 2, timeout=250):
            assert status == 0, output

    @functools.cache
    def results(how, rank):
        if rank is None:
            return fitting.run(None, how)
        run(*(["compiled"] if how == "compiled" else EAGER))
        return json.loads((folder / f"{how}-{rank}.json").read_text())

    return results


@pytest.mark.parametrize("how", TOGETHER)
def test_two_uneven_processes_end_at_the_weights_and_logs_of_one(found, how):
    one = found("eager", None)
    for rank in range(2):
        own = found(how, rank)
        assert gap(own, one) < 2e-6
        assert own["history"].keys() == one["history"].keys() >= {"accuracy", "loss"}
        assert len(own["history"]) == 3
        for name, values in one["history"].items():
            np.testing.assert_allclose(own["history"][name], values, rtol=1e-5)
        np.testing.assert_allclose(own["scores"], one["scores"], rtol=1e-5)


@pytest.mark.parametrize("how", TOGETHER)
def test_both_processes_have_the_same_bits(found, how):
    assert found(how, 0)["weights"] == found(how, 1)["weights"]


def test_local_statistics_end_elsewhere_though_gradients_are_averaged(found):
    assert gap(found("local", 0), found("eager", None)) > 1e-2


def test_without_it_the_processes_go_apart(found):
    assert gap(found("apart", 0), found("apart", 1)) > 1e-1


def test_a_batch_less_is_an_error_on_both_at_once(found):
    assert "a further batch, where another process has no more" in found("fewer", 0)["error"]
    assert "the end of the data, where another process has a further" in found("fewer", 1)["error"]


def test_a_process_outside_of_the_group_is_told_so(found):
    assert not found("outside", 0)["error"]
    assert "that this process is a member of" in found("outside", 1)["error"]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_averaged_is_refused():
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(syncbn.InputError, match="Received: one that is without weights"):
        syncbn.average_gradients(model)
    model.build((None, 2))
    with pytest.raises(syncbn.InputError, match="Received: one that is not compiled"):
        syncbn.average_gradients(model)


@pytest.mark.usefixtures("alone")
def test_a_loss_that_is_no_mean_is_refused():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.raises(syncbn.InputError, match="reduction='sum'"):
        syncbn.average_gradients(model)


@pytest.mark.usefixtures("alone")
def test_an_output_with_a_mask_is_refused():
    model = keras.Sequential([keras.Input((3, 2)), keras.layers.Masking(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    syncbn.average_gradients(model)
    with pytest.raises(syncbn.InputError, match="an output with a mask"):
        model.fit(np.ones((4, 3, 2)), np.ones((4, 3, 1)), verbose=0)


@pytest.mark.usefixtures("alone")
def test_a_model_that_is_compiled_anew_is_to_be_given_again():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    syncbn.average_gradients(model)
    model.compile("sgd", "mse")
    with pytest.raises(syncbn.InputError, match="compiled anew since"):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


def test_without_a_process_group_it_is_refused():
    with pytest.raises(syncbn.NotSynchronizableError, match="init_process_group first"):
        syncbn.average_gradients(keras.Sequential())
