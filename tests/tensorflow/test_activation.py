"""`activation=`: applied inside, computed again by the backward rather than kept."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.derivatives import central_differences, input_gradient_along
from tests.graphs import kept_for_the_backward, traced
from tests.harness import assert_close, assert_equals_one_device, make_case, observe
from tests.oracle import ACTIVATIONS
from tests.replicas.tensorflow import make_layer, make_step, strategy_for

import syncbn

NAMES = [name for name in ACTIVATIONS if name not in (None, "linear")]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_an_activation_inside_gives_what_one_device_gives(name, dtype):
    case = make_case([(33, 6, 5), (32, 6, 5)], dtype=dtype)._replace(options={"activation": name})
    tolerance = {"float32": 2e-6, "float64": 1e-11}[dtype]
    if name == "leaky_relu":
        tolerance = 2e-6  # TensorFlow's slope is a float32, also for float64
    assert_equals_one_device(case, observe(case), tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_activation_in_half_precision(dtype):
    case = make_case([(33, 6, 5), (32, 6, 5)], dtype=dtype)
    case = case._replace(options={"activation": "relu"})
    tolerance = {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    # At zero a rounding decides whether a cotangent passes, here and on one device.
    observed = observe(case, dtype=f"mixed_{dtype}")
    assert_close("outputs", observed.outputs[0], case.expected().outputs[0], tolerance)
    kept = np.abs(case._replace(options={}).expected().outputs[0]) > tolerance * 4
    own, its = observed.input_gradients[0], case.expected().input_gradients[0]
    assert_close("input gradients", own[kept], its[kept], tolerance * 4)


@pytest.mark.parametrize("shape", [(8, 6, 6, 5), (8, 5), (4, 6, 5)])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "linear", "silu", "gelu"])
def test_nothing_of_the_input_s_size_is_kept_but_the_input(name, shape):
    case = make_case([shape])._replace(options={"activation": name})
    layer = make_layer(case, strategy_for(1))
    x, dy = tf.constant(case.parts[0]), tf.constant(case.cotangents[0])
    assert kept_for_the_backward(make_step(layer), x, dy) <= {"Placeholder", "Reshape"}


def test_an_activation_as_a_layer_of_its_own_keeps_its_argument_or_result():
    """The control of the test above, and what the argument is good for."""
    layer = syncbn.SyncBatchNormalization()

    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = keras.activations.silu(layer(x, training=True))
        return tape.gradient(y, x, output_gradients=dy)

    layer.build((None, 5))
    kept = kept_for_the_backward(step, tf.ones((8, 5)), tf.ones((8, 5)))
    assert kept - {"Placeholder", "Reshape"}


def test_still_one_collective_each_way():
    case = make_case([(5, 7), (6, 7)])._replace(options={"activation": "relu"})
    layer = make_layer(case, strategy_for(2))
    assert len(traced(2, make_step(layer), case)) == 2 * 2


def test_in_inference_too():
    case = make_case([(9, 4)])._replace(options={"activation": "relu"})
    layer = make_layer(case, strategy_for(1))
    plain = make_layer(case._replace(options={}), strategy_for(1))
    expected = tf.nn.relu(plain(case.parts[0], training=False))
    np.testing.assert_array_equal(layer(case.parts[0], training=False), expected)
    layer.trainable = False
    np.testing.assert_array_equal(layer(case.parts[0], training=True), expected)


def test_softmax_which_is_not_elementwise():
    case = make_case([(9, 4)])
    layer = make_layer(case, strategy_for(1), activation="softmax")
    x, dy = tf.constant(case.parts[0]), tf.constant(case.cotangents[0])
    _, dx, _ = make_step(layer)(x, dy)

    def loss(x):
        z = case._replace(parts=[x]).expected().outputs[0]
        y = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
        return (y * case.cotangents[0]).sum()

    expected = central_differences(loss, case.parts[0].astype("f8"))
    assert_close("input gradients", dx, expected, 5e-6)


def test_gradients_of_gradients_through_the_activation():
    case = make_case([(6, 3)], dtype="float64")._replace(options={"activation": "tanh"})
    layer = make_layer(case, strategy_for(1), "float64")
    x, dy = tf.constant(case.parts[0]), tf.constant(case.cotangents[0])
    direction = np.random.default_rng(5).normal(size=x.shape)
    with tf.GradientTape() as outer:
        outer.watch(x)
        scalar = input_gradient_along(layer, x, dy, direction)
    observed = outer.gradient(scalar, x)

    def moved(x):
        return (direction * case._replace(parts=[x]).expected().input_gradients[0]).sum()

    assert_close("by x", observed, central_differences(moved, case.parts[0]), 1e-6)


@pytest.mark.parametrize("name", [None, "linear", "identity", keras.activations.linear])
def test_the_identity_is_no_activation(name):
    assert syncbn.SyncBatchNormalization(activation=name).activation is None


@pytest.mark.parametrize(
    "activation",
    [
        "nonsense",
        "glu",  # changes the shape
        "get",  # no activation, but a name there
        lambda x: tf.nn.dropout(x, 0.5),  # computed again it would be another
        keras.layers.PReLU(),
        keras.layers.ReLU,
        3,
    ],
)
def test_anything_but_an_activation_of_keras_is_refused(activation):
    with pytest.raises(syncbn.InputError, match=r"requires the name of an activation .* layer"):
        syncbn.SyncBatchNormalization(activation=activation)


def test_every_activation_of_keras_that_is_one_is_taken():
    x = tf.random.normal((4, 6))
    others = {"deserialize", "get", "serialize", "glu", "threshold"}
    for name in sorted(set(dir(keras.activations)) - others):
        if not name.startswith("_"):
            layer = syncbn.SyncBatchNormalization(activation=name)
            for training in (True, False):
                assert layer(x, training=training).shape == x.shape
            assert type(layer).from_config(layer.get_config()).activation == layer.activation
