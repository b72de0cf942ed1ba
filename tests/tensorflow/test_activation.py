"""`activation=`: computed again by the backward rather than kept."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.derivatives import input_gradient_along
from tests.differences import central_differences
from tests.graphs import kept_for_the_backward, traced
from tests.harness import assert_close, make_case
from tests.replicas.tensorflow import make_layer, make_step, strategy_for

import syncbn


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
