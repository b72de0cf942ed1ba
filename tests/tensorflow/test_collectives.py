"""Contract 3: one collective each way, both packed; none in inference, none when frozen."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.graphs import traced
from tests.harness import make_case, observe
from tests.replicas.tensorflow import make_layer, make_step, per_replica, strategy_for

import syncbn
from syncbn._backends.tensorflow import collectives


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_one_collective_forward_and_one_backward_on_each_replica(replicas):
    case = make_case([(3 + r, 5, 4) for r in range(replicas)])
    layer = make_layer(case, strategy_for(replicas))

    forward = traced(replicas, lambda x, _: layer(x, training=True), case)
    both = traced(replicas, make_step(layer), case)

    expected = replicas if replicas > 1 else 0
    assert len(forward) == expected
    assert len(both) == 2 * expected


def test_the_forward_payload_is_2c_plus_1_float64_and_the_backward_2c():
    case = make_case([(5, 7), (6, 7)])
    layer = make_layer(case, strategy_for(2))
    nodes = traced(2, make_step(layer), case)
    payloads = sorted(
        (tf.as_dtype(node.attr["T"].type).name, *_output_size(node)) for node in nodes
    )
    assert payloads == [("float32", 14), ("float32", 14), ("float64", 15), ("float64", 15)]


def _output_size(node):
    shapes = node.attr["_output_shapes"].list.shape
    return [int(np.prod([dim.size for dim in shape.dim])) for shape in shapes]


@pytest.mark.parametrize("training", [False, None])
def test_inference_has_no_collective(training):
    case = make_case([(5, 7), (6, 7)])
    layer = make_layer(case, strategy_for(2))
    assert traced(2, lambda x, _: layer(x, training=training), case) == []
    assert traced(2, make_step(layer, training=False), case) == []


def test_a_frozen_layer_has_no_collective_and_keeps_its_statistics():
    case = make_case([(5, 7), (6, 7)])
    strategy = strategy_for(2)
    layer = make_layer(case, strategy)
    layer.trainable = False
    assert traced(2, lambda x, _: layer(x, training=True), case) == []
    strategy.run(lambda x: layer(x, training=True), args=(per_replica(strategy, case.parts),))
    assert not layer.moving_mean.numpy().any()


def test_collectives_of_a_model_are_one_each_way_for_each_layer():
    strategy = strategy_for(2)
    with strategy.scope():
        inputs = keras.Input((8,))
        x = inputs
        for _ in range(3):
            x = syncbn.SyncBatchNormalization()(keras.layers.Dense(8, activation="relu")(x))
        model = keras.Model(inputs, x)
    case = make_case([(5, 8), (6, 8)])

    def step(x, dy):
        with tf.GradientTape() as tape:
            y = model(x, training=True)
        return tape.gradient(y, [v.value for v in model.trainable_variables], output_gradients=dy)

    assert len(traced(2, step, case)) == 2 * 3 * 2


def test_keras_synchronized_issues_five():
    """The counter counts: Keras's own synchronization, known to issue five a replica."""
    case = make_case([(5, 7), (6, 7)])
    layer = make_layer(
        case, strategy_for(2), layer_class=keras.layers.BatchNormalization, synchronized=True
    )
    assert len(traced(2, make_step(layer), case)) == 5 * 2


@pytest.mark.parametrize("replicas", [2, 4])
def test_the_table_is_one_float32_collective(replicas, monkeypatch):
    monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    case = make_case([(3 + r, 4) for r in range(replicas)])
    layer = make_layer(case, strategy_for(replicas))
    nodes = traced(replicas, lambda x, _: layer(x, training=True), case)
    assert [tf.as_dtype(node.attr["T"].type).name for node in nodes] == ["float32"] * replicas
    assert {size for node in nodes for size in _output_size(node)} == {replicas * (2 * 4 + 1)}


def test_moving_statistics_are_written_without_a_reduction_of_their_own():
    """By Keras 3.7's default every assignment would be averaged over the replicas."""
    layer = make_layer(make_case([(5, 7), (6, 7)]), strategy_for(2))
    for variable in (layer.moving_mean, layer.moving_variance):
        assert variable.value.aggregation.value == tf.VariableAggregation.NONE.value


def test_moving_statistics_are_bitwise_equal_after_many_steps():
    strategy = strategy_for(4)
    case = make_case([(3, 6), (9, 6), (1, 6), (0, 6)])
    layer = make_layer(case, strategy)
    rng = np.random.default_rng(1)

    @tf.function(reduce_retracing=True, autograph=False)
    def train(x):
        return strategy.run(lambda x: layer(x, training=True), args=(x,))

    for _ in range(20):
        train(per_replica(strategy, [rng.normal(3, 2, p.shape).astype("f4") for p in case.parts]))
    for variable in (layer.moving_mean, layer.moving_variance):
        copies = {v.numpy().tobytes() for v in strategy.experimental_local_results(variable.value)}
        assert len(copies) == 1


def test_observe_sees_every_replica():
    """The harness compares all copies, not one of them four times."""
    observed = observe(make_case([(3, 6), (9, 6), (1, 6), (2, 6)]))
    assert len(observed.moving_means) == len(observed.outputs) == 4
