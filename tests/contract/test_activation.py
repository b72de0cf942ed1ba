"""`activation=`: applied inside, in training and in inference."""

import numpy as np
import pytest
from keras import ops
from tests.contract.test_features import ROUNDED_BY_KERAS
from tests.differences import central_differences
from tests.harness import assert_close, assert_equals_one_device, make_case, numbers, observe
from tests.oracle import ACTIVATIONS
from tests.which_keras import SyncBatchNormalization, keras

NAMES = [name for name in ACTIVATIONS if name not in (None, "linear")]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_an_activation_inside_gives_what_one_device_gives(name, dtype):
    case = make_case([(33, 6, 5), (32, 6, 5)], dtype=dtype)._replace(options={"activation": name})
    tolerance = {"float32": 2e-6, "float64": 1e-11}[dtype]
    if name in ROUNDED_BY_KERAS.get(keras.backend.backend(), ()):
        tolerance = 2e-6
    mode = {"float32": "graph", "float64": "eager"}[dtype]
    assert_equals_one_device(case, observe(case, mode=mode), tolerance)


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


def test_in_inference_too():
    x = np.random.default_rng(0).normal(size=(9, 4)).astype("f4")
    layer = SyncBatchNormalization(activation="relu")
    expected = np.maximum(numbers(SyncBatchNormalization()(x, training=False)), 0)
    np.testing.assert_array_equal(numbers(layer(x, training=False)), expected)
    layer.trainable = False
    np.testing.assert_array_equal(numbers(layer(x, training=True)), expected)


def test_softmax_which_is_not_elementwise():
    case = make_case([(9, 4)])
    observed = observe(case, activation="softmax")

    def loss(x):
        z = case._replace(parts=[x]).expected().outputs[0]
        y = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
        return (y * case.cotangents[0]).sum()

    expected = central_differences(loss, case.parts[0].astype("f8"))
    assert_close("input gradients", observed.input_gradients[0], expected, 5e-6)


@pytest.mark.parametrize("name", [None, "linear", "identity", keras.activations.linear])
def test_the_identity_is_no_activation(name):
    assert SyncBatchNormalization(activation=name).activation is None


def test_every_activation_of_keras_that_is_one_is_taken():
    x = ops.ones((4, 6))
    others = {"deserialize", "get", "serialize", "glu", "threshold"}
    names = [name for name in sorted(set(dir(keras.activations)) - others) if name[0] != "_"]
    # JAX compiles each of their operations, for a second an activation: there every fifth runs.
    run = names[:: 5 if keras.backend.backend() == "jax" else 1]
    for name in names:
        layer = SyncBatchNormalization(activation=name)
        assert type(layer).from_config(layer.get_config()).activation == layer.activation
        for training in (True, False) if name in run else ():
            assert layer(x, training=training).shape == x.shape
