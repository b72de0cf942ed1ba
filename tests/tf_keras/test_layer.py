"""What the layer of tf_keras has to do that Keras 3's has not."""

import importlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import syncbn
from syncbn.tf_keras import SyncBatchNormalization
from tests.graphs import traced
from tests.harness import make_case, numbers
from tests.replicas.tensorflow import make_layer, make_step, mirrored_strategy

SHAPES = {
    "2": ((7, 4), -1),
    "3": ((3, 7, 4), 1),
    "4": ((3, 5, 4, 6), -1),
    "4 first": ((3, 5, 4, 6), 1),
    "5": ((2, 3, 4, 5, 6), -1),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["inference", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_inference_is_tf_keras_s_to_the_last_bit(shape, dtype, frozen):
    """By the kernel that tf_keras takes: the fused one for images, with `fused=False` not."""
    shape, axis = SHAPES[shape]
    rng = np.random.default_rng(0)
    x = rng.normal(5, 3, shape).astype("float64" if dtype == "float64" else "float32")
    for fused in (None, False):
        layers = [
            layer_class(axis=axis, dtype=dtype, fused=fused)
            for layer_class in (SyncBatchNormalization, tf_keras.layers.BatchNormalization)
        ]
        for layer in layers:
            layer.build(shape)
        layers[1].set_weights([rng.uniform(0.5, 2, w.shape) for w in layers[1].get_weights()])
        layers[0].set_weights(layers[1].get_weights())
        for layer in layers:
            layer.trainable = not frozen
        own, its = (layer(x, training=frozen) for layer in layers)
        assert own.dtype == its.dtype
        np.testing.assert_array_equal(numbers(own), numbers(its))


@pytest.mark.parametrize("trainable", [True, False])
def test_a_step_has_a_collective_each_way_and_frozen_none(trainable):
    case = make_case([(5, 4), (3, 4)])
    layer = make_layer(case, mirrored_strategy(2), trainable=trainable)
    found = traced(2, make_step(layer), case)
    assert len(found) == (2 * 2 if trainable else 0)  # in the graph of each of two replicas


def test_moving_statistics_read_across_replicas_are_those_of_each():
    """tf_keras averages what is the same: of three replicas a rounding away."""
    strategy = mirrored_strategy(3)
    value = np.array([0.1, 1 / 3, 1e-3, 7.7], "f4")
    with strategy.scope():
        layers = [SyncBatchNormalization(momentum=None), tf_keras.layers.BatchNormalization()]
        for layer in layers:
            layer.build((None, 4))
    different = []
    for layer in layers:
        layer.moving_mean.assign(value)  # on all of them
        copies = strategy.experimental_local_results(layer.moving_mean)
        assert all((numbers(copy) == value).all() for copy in copies)
        with strategy.scope():
            different.append((numbers(layer.moving_mean.read_value()) != value).any())
    assert different == [False, True]
    counter = layers[0].num_batches_tracked
    counter.assign(2**40 + 1)
    assert int(counter.numpy()) == 2**40 + 1
    layers[0].set_weights([w * 0 + 3 for w in layers[0].get_weights()])
    for weight in layers[0].weights:
        assert {float(np.max(numbers(c))) for c in strategy.experimental_local_results(weight)} == {
            3
        }


def test_an_axis_in_a_list_is_that_axis_and_several_are_refused():
    layer = SyncBatchNormalization(axis=[-1], momentum=0.0)
    layer(np.ones((2, 3, 4), "f4"), training=True)
    assert layer.get_config()["axis"] == 2
    with pytest.raises(syncbn.InputError, match=r"requires one axis .*axis=\[1, 2\]"):
        SyncBatchNormalization(axis=[1, 2])


def test_an_adjustment_is_refused():
    with pytest.raises(syncbn.InputError, match="Received: adjustment, a function"):
        SyncBatchNormalization(adjustment=lambda _: (1.0, 0.0))
    SyncBatchNormalization(adjustment=None)


def test_training_that_only_the_step_knows_is_refused_and_a_constant_is_taken():
    layer = SyncBatchNormalization(momentum=0.0)
    x = np.ones((4, 3), "f4")

    @tf.function
    def step(training):
        return layer(x, training=training)

    with pytest.raises(syncbn.UnsupportedFeatureError, match="training as a tensor"):
        step(tf.constant(True))
    layer(x, training=tf.constant(False))
    assert not numbers(layer.moving_mean).any()
    layer(x, training=tf.constant(True))
    np.testing.assert_array_equal(numbers(layer.moving_mean), 1)


def test_a_model_may_be_made_under_a_strategy_with_training_true():
    """tf_keras calls the layer for its shapes then, where replicas cannot meet."""
    with mirrored_strategy(2).scope():
        inputs = tf_keras.Input((4,))
        model = tf_keras.Model(inputs, SyncBatchNormalization()(inputs, training=True))
    assert model.output_shape == (None, 4)


def test_definitions_are_those_of_keras_2():
    layer = SyncBatchNormalization(activation="hard_sigmoid", center=False)
    x = np.linspace(-4, 4, 9, dtype="f4")[:, None]
    expected = tf_keras.activations.hard_sigmoid(tf_keras.layers.BatchNormalization()(x))
    np.testing.assert_array_equal(numbers(layer(x)), numbers(expected))
    given = tf_keras.activations.get("leaky_relu")
    assert SyncBatchNormalization(activation=given, save="output").activation is given


def test_without_tf_keras_there_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "tf_keras", None)
    monkeypatch.delitem(sys.modules, "syncbn.tf_keras")
    with pytest.raises(ModuleNotFoundError, match="pip install tf_keras"):
        importlib.import_module("syncbn.tf_keras")


def test_keras_3_on_another_backend_is_one_error(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(syncbn.NotSynchronizableError, match="variable KERAS_BACKEND=tensorflow"):
        SyncBatchNormalization()
