"""`syncbn.average_gradients`: Keras's `fit` by two processes gives what one gives on all data."""

import functools
import json
import sys

import keras
import numpy as np
import pytest
import torch
from tests.multiprocess.cluster import run_processes
from torch import distributed

import syncbn
from syncbn._backends.torch.gradients import summed

# Compiled it is the same step, after a minute of compiling.
TOGETHER = ["eager", pytest.param("compiled", marks=pytest.mark.frameworks)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process has found, run when the first test asks for it."""
    folder = tmp_path_factory.mktemp("fitting")
    command = [sys.executable, "-m", "tests.torch.fitting", str(folder)]

    @functools.cache
    def run(processes, *hows):
        for status, output in run_processes([*command, *hows], processes, timeout=250):
            assert status == 0, output

    def results(how, rank):
        if rank is None:
            run(1, how)
        else:
            run(2, *(["compiled"] if how == "compiled" else ["eager", "local", "apart"]))
        return json.loads((folder / f"{how}-{rank}.json").read_text())

    return results


def gap(one, other):
    return max(
        np.abs(np.subtract(a, b)).max()
        for a, b in zip(one["weights"], other["weights"], strict=True)
    )


@pytest.mark.parametrize("how", TOGETHER)
def test_two_uneven_processes_end_at_the_weights_and_logs_of_one(found, how):
    one = found("eager", None)
    for rank in range(2):
        own = found(how, rank)
        assert gap(own, one) < 2e-6
        assert own["history"].keys() == one["history"].keys() == {"accuracy", "loss"}
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


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_tensors_of_several_dtypes_keep_their_places_and_none_stays_none():
    given = [torch.ones(2, 3), None, torch.ones(4, dtype=torch.float64), torch.zeros(())]
    found = summed(given, None)
    assert found[1] is None
    for own, its in zip(found, given, strict=True):
        assert own is its is None or torch.equal(own, its)


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_averaged_is_refused():
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(syncbn.InputError, match="Received: one that is without weights"):
        syncbn.average_gradients(model)
    model.build((None, 2))
    with pytest.raises(syncbn.InputError, match="Received: one that is not compiled"):
        syncbn.average_gradients(model)


def test_without_a_process_group_it_is_refused():
    with pytest.raises(syncbn.NotSynchronizableError, match="init_process_group first"):
        syncbn.average_gradients(keras.Sequential())
