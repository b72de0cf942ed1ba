"""Contract 3 in what XLA compiles: two collectives a layer in the train step of Keras itself."""

import re

import jax
import keras
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tests.harness import make_case
from tests.replicas.jax import State, distributed, filled_up, make_layer, make_step

import syncbn

COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def collectives_in(compiled_text):
    """The shapes of what travels, one entry a collective; several arrays in one are one."""
    return [line.strip() for line in compiled_text.splitlines() if COLLECTIVE.search(line)]


@pytest.fixture
def compiled_steps(monkeypatch):
    """What XLA made of the functions that Keras's trainer compiles, in the order of first calls."""
    texts = []

    def recording_jit(function, **options):
        compiled = jax.jit(function, **options)

        def run(*arguments):
            texts.append(compiled.lower(*arguments).compile().as_text())
            return compiled(*arguments)

        return run

    monkeypatch.setattr("keras.src.backend.jax.trainer.jit", recording_jit)
    return texts


def fit_one_step(normalizations):
    """A step of `model.fit` with so many normalizations between dense layers."""
    layers = [keras.Input((8,)), keras.layers.Dense(16)]
    for normalization in normalizations:
        layers += [normalization(), keras.layers.ReLU(), keras.layers.Dense(16)]
    model = keras.Sequential(layers)
    model.compile("sgd", "mse", jit_compile=True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 8)).astype("f"), rng.normal(size=(32, 16)).astype("f")
    model.fit(x, y, batch_size=32, epochs=1, verbose=0)
    return model


@pytest.mark.parametrize("layers", [1, 3])
def test_two_collectives_a_layer_in_the_train_step_of_keras(compiled_steps, layers):
    with distributed("data parallel", 4):
        fit_one_step([])
        fit_one_step([syncbn.SyncBatchNormalization] * layers)
        fit_one_step([keras.layers.BatchNormalization] * layers)
    without, ours, keras_own = (len(collectives_in(text)) for text in compiled_steps)
    assert ours - without == 2 * layers
    # The check sees collectives: Keras's layer has twice as many.
    assert keras_own - without == 4 * layers


def test_channels_split_over_devices_stay_there(compiled_steps):
    """Of what XLA does for the layer, whose variables are split; dense layers pay for theirs."""
    with distributed("model parallel", 2):
        fit_one_step([syncbn.SyncBatchNormalization] * 3)
    found = [line for line in collectives_in(compiled_steps[0]) if "batch_normalization" in line]
    assert len(found) == 2 * 3, "\n".join(found)
    # 8 of the 16 channels: count, mean and M2 of each, of 2 replicas.
    assert sum("f32[2,3,8]" in line for line in found) == 3


def collectives_of_a_mapped_step(case, **options):
    layer = make_layer(case, **options)
    step = make_step(layer)
    mesh = Mesh(np.array(jax.devices()[: len(case.parts)]), ("data",))

    def body(state, values):
        y, dx, *rest = step(state, **{name: value[0] for name, value in values.items()})
        return y[None], dx[None], rest

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=(PartitionSpec("data"), PartitionSpec("data"), PartitionSpec()),
    )
    values = jax.device_put(filled_up(case), NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(mapped).lower(State.of(layer), values).compile()
    return collectives_in(compiled.as_text())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 2},
        {"activation": "silu", "unbiased_moving_variance": True},
        {"renorm": True},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_one_collective_forward_and_one_backward_in_shard_map(options):
    """That of the backward has the gradients of gamma and beta in it, which JAX else sums again."""
    case = make_case([(9, 4), (7, 4), (8, 4), (8, 4)])
    found = collectives_of_a_mapped_step(case, **options)
    assert len(found) == 2, "\n".join(found)


def test_virtual_batches_have_a_collective_for_the_moving_statistics_alone():
    case = make_case([(9, 4), (8, 4)])
    forward, *backward = collectives_of_a_mapped_step(case, virtual_batch_size=4)
    # Behind it there is only what JAX sums of gamma and beta, as of every weight.
    assert "f32[2,9]" in forward
    assert all("f32[4]" in line for line in backward)


def test_a_frozen_layer_and_inference_have_none():
    case = make_case([(8, 4), (8, 4)])
    with distributed("data parallel", 2):
        layer = make_layer(case)
        for training, trainable in ((True, False), (False, True)):
            layer.trainable = trainable
            compiled = jax.jit(lambda x, t=training: layer(x, training=t)).lower(case.parts[0])
            assert not collectives_in(compiled.compile().as_text())
        layer.trainable = True
        compiled = jax.jit(lambda x: layer(x, training=True)).lower(case.parts[0])
        assert collectives_in(compiled.compile().as_text())


@pytest.mark.parametrize("replicas", [2, 4])
def test_the_payload_is_a_row_for_each_replica_without_float64(replicas):
    case = make_case([(8, 4)] * replicas)
    forward, backward = collectives_of_a_mapped_step(case)
    assert f"f32[{replicas},9]" in forward
    assert "f32[2,4]" in backward


@pytest.mark.parametrize("replicas", [2, 4])
def test_the_payload_does_not_depend_on_the_replicas_with_float64(replicas):
    case = make_case([(8, 4)] * replicas)
    with jax.enable_x64(True):
        forward, backward = collectives_of_a_mapped_step(case)
    assert "f64[9]" in forward
    assert "f32[2,4]" in backward
