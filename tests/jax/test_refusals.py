"""Contract 6, loud, never local: errors where the layer cannot do what it was asked for."""

import jax
import keras
import numpy as np
import pytest
from tests.harness import make_case, observe
from tests.replicas.jax import MAPPED, distributed

import syncbn

X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")


@pytest.mark.parametrize("context", ["eager", "jit", "data parallel", *MAPPED])
def test_an_axis_name_that_is_not_bound_is_refused_in_training(context):
    def refused():
        return pytest.raises(syncbn.NotSynchronizableError, match=r"\['dta'\] is not bound")

    if context in MAPPED:
        with refused():
            observe(make_case([(4, 3), (4, 3)]), context=context, axis_name="dta")
        return
    with distributed(context, 2):
        layer = syncbn.SyncBatchNormalization(axis_name="dta")
        # Inference needs no axis, and neither does a model that is being built.
        keras.Sequential([keras.Input((3,)), layer]).predict(X, verbose=0)
        assert layer(X, training=False).shape == X.shape

        def train(x):
            return layer(x, training=True)

        with refused():
            (train if context == "eager" else jax.jit(train))(X)


def test_one_unbound_name_of_several_is_refused():
    with pytest.raises(syncbn.NotSynchronizableError, match=r"\['b'\] is not bound"):
        observe(make_case([(4, 3), (4, 3)]), context="shard_map", axis_name=("data", "b"))


@pytest.mark.parametrize(
    ("context", "group_size"), [("shard_map", 3), ("pmap", 3), ("data parallel", 3)]
)
def test_what_is_no_partition_of_the_replicas_is_refused(context, group_size):
    with pytest.raises(syncbn.InputError, match="divisor of the number of replicas, 2"):
        observe(make_case([(4, 3), (4, 3)]), context=context, group_size=group_size)


@pytest.mark.parametrize("arguments", [{"nan_check": True}, {"save": "output"}])
@pytest.mark.parametrize("context", ["jit", "shard_map", "pmap", "data parallel"])
def test_what_needs_values_is_refused_where_xla_compiles(context, arguments):
    sizes = [8] if context == "jit" else [4, 4]
    case = make_case([(size, 3) for size in sizes])
    context = "shard_map" if context == "jit" else context
    with pytest.raises(syncbn.UnsupportedFeatureError, match="leaves assertions out"):
        observe(case, context=context, **arguments)


def test_channels_on_the_first_axis_leave_no_examples_for_virtual_batches():
    with pytest.raises(syncbn.InputError, match="requires examples on the first axis"):
        syncbn.SyncBatchNormalization(axis=0, virtual_batch_size=2)(X, training=True)
