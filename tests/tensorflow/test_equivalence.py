"""Contract 1 in TensorFlow's own terms: sizes that a trace knows or not, gradients of its forms."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.harness import RANKS_AND_AXES, assert_close, assert_equals_one_device, make_case, observe
from tests.replicas.tensorflow import any_size, local_results, make_layer, per_replica, strategy_for

import syncbn


@pytest.mark.parametrize(("shape", "axis"), RANKS_AND_AXES)
def test_any_rank_and_axis_of_known_sizes(shape, axis):
    case = make_case([(9, *shape), (4, *shape)], axis=axis)
    assert_equals_one_device(case, observe(case, unknown_sizes=False), 2e-6)


@pytest.mark.parametrize("known_sizes", [True, False])
def test_an_empty_batch_behind_a_convolution(known_sizes):
    """oneDNN's convolution returns an empty batch in the wrong shape, (0, 9, 9, 3) here."""
    strategy = strategy_for(2)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((9, 9, 3)), keras.layers.Conv2D(5, 3), syncbn.SyncBatchNormalization()]
        )
    x, dy = make_case([(8, 9, 9, 3), (0, 9, 9, 3)]), make_case([(8, 7, 7, 5), (0, 7, 7, 5)])

    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
        return y, tape.gradient(y, x, output_gradients=dy)

    signature = [any_size(per_replica(strategy, parts), -1) for parts in (x.parts, dy.cotangents)]
    run = tf.function(
        lambda x, dy: strategy.run(step, args=(x, dy)),
        input_signature=None if known_sizes else signature,
        autograph=False,
    )
    y, _ = run(per_replica(strategy, x.parts), per_replica(strategy, dy.cotangents))
    alone = model.layers[0](x.parts[0]).numpy()
    expected = alone - alone.mean((0, 1, 2))
    assert_close(
        "outputs",
        local_results(strategy, y)[0] * np.sqrt(alone.var((0, 1, 2)) + 1e-3),
        expected,
        1e-5,
    )


def test_a_gradient_of_rows_that_were_gathered():
    """TensorFlow hands it over as IndexedSlices."""
    case = make_case([(8, 2, 2, 3)])
    layer = make_layer(case, strategy_for(1))
    rows, weights = [0, 2, 2], tf.constant(case.cotangents[0][:3])

    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.gather(layer(x, training=True), rows) * weights)
        return tape.gradient(y, x)

    cotangent = np.zeros_like(case.parts[0])
    np.add.at(cotangent, rows, weights.numpy())
    expected = case._replace(cotangents=[cotangent]).expected().input_gradients[0]
    assert_close("input gradients", run(tf.constant(case.parts[0])), expected, 2e-6)


def test_a_number_of_channels_that_the_trace_does_not_know():
    case = make_case([(9, 4)])
    layer = make_layer(case, strategy_for(1))
    run = tf.function(
        lambda x: layer(x, training=True), input_signature=[tf.TensorSpec((None, None))]
    )
    assert_close("outputs", run(case.parts[0]), case.expected().outputs[0], 2e-6)
