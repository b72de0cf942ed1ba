"""A model with the layer is exported as one with Keras's: to the last bit, with no collective."""

import re

import jax
import keras
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tests import exported
from tests.exported import X

import syncbn


@pytest.fixture(scope="module")
def models():
    """The one with the layer, trained on two devices; the other with Keras's."""
    keras.utils.set_random_seed(0)
    devices = keras.distribution.list_devices()[:2]
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    )
    try:
        on_devices = exported.trained(exported.synchronized())
        assert len(on_devices.weights[0].value.sharding.device_set) == 2
        weights = on_devices.get_weights()
    finally:
        keras.distribution.set_distribution(None)
    # As it is loaded to be exported: on one device.
    model = exported.synchronized()
    model.set_weights(weights)
    return on_devices, model, exported.plain(model)


def collectives(module):
    names = "all_reduce|all_gather|all_to_all|reduce_scatter|collective_"
    return re.findall(rf"stablehlo\.(?:{names})\w*", module)


def test_the_exported_program_is_keras_s_own(models):
    own, its = (
        jax.export.export(jax.jit(lambda x, model=model: model(x, training=False)))(
            jax.ShapeDtypeStruct(X.shape, X.dtype)
        )
        for model in models[1:]
    )
    np.testing.assert_array_equal(np.asarray(own.call(X)), np.asarray(its.call(X)))
    assert "stablehlo.convolution" in own.mlir_module()
    assert not collectives(own.mlir_module())


def test_inference_on_several_devices_has_no_collective_either(models):
    compiled = jax.jit(lambda x: models[0](x, training=False)).lower(X).compile().as_text()
    assert "convolution" in compiled
    assert "all-reduce" not in compiled
    assert "all-gather" not in compiled


def test_what_looks_for_collectives_finds_those_of_training():
    """The negative control."""
    layer = syncbn.SyncBatchNormalization()
    layer.build((None, 4))
    mesh = Mesh(np.array(jax.devices()[:2]), ("replicas",))

    def outputs(x, training):
        state = [v.value for v in layer.non_trainable_variables]
        held = [v.value for v in layer.trainable_variables], state
        return layer.stateless_call(*held, x, training=training)[0]

    for training in (False, True):
        step = jax.shard_map(
            lambda x, training=training: outputs(x, training),
            mesh=mesh,
            in_specs=P("replicas"),
            out_specs=P("replicas"),
        )
        module = jax.export.export(jax.jit(step))(jax.ShapeDtypeStruct((8, 4), "float32"))
        assert bool(collectives(module.mlir_module())) is training


@pytest.mark.filterwarnings("ignore")  # those of the way through TensorFlow
def test_a_saved_model_too(models, tmp_path):
    tf = pytest.importorskip("tensorflow")
    found = []
    for name, model in zip("ab", models[1:], strict=True):
        model.export(str(tmp_path / name), verbose=False)
        loaded = tf.saved_model.load(str(tmp_path / name))  # its variables live as long as it does
        found.append(loaded.serve(X).numpy())
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], np.asarray(models[1](X)), rtol=0, atol=1e-5)
