"""Contract 6, loud, never local: errors where the layer cannot synchronize, with the remedy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.harness import make_case
from tests.replicas.tensorflow import make_layer, per_replica, strategy_for

import syncbn


def a_tf_cond(layer, x):
    return tf.cond(tf.reduce_sum(x) < 1e9, lambda: layer(x, training=True), lambda: x)


def a_tf_while_loop(layer, x):
    return tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, layer(y, training=True)), (0, x))


def a_nested_tf_function(layer, x):
    return tf.function(lambda x: layer(x, training=True))(x)


@pytest.mark.parametrize("autograph", [True, False])
@pytest.mark.parametrize("body", [a_tf_cond, a_tf_while_loop, a_nested_tf_function])
def test_control_flow_within_a_replica_is_refused_with_the_remedy(body, autograph):
    strategy = strategy_for(2)
    case = make_case([(9, 4), (4, 4)])
    layer = make_layer(case, strategy)

    @tf.function(autograph=autograph)
    def step(x):
        return strategy.run(lambda x: body(layer, x), args=(x,))

    with pytest.raises(syncbn.NotSynchronizableError) as raised:
        step(per_replica(strategy, case.parts))
    assert "Received: a call inside tf.cond, tf.while_loop or a nested tf.function" in str(
        raised.value
    )
    assert "around strategy.run" in str(raised.value)


@pytest.mark.parametrize("body", [a_tf_cond, a_tf_while_loop, a_nested_tf_function])
def test_control_flow_on_one_device_works(body):
    case = make_case([(9, 4)])
    layer = make_layer(case, strategy_for(1))
    tf.function(lambda x: body(layer, x))(tf.constant(case.parts[0]))
    assert np.abs(layer.moving_mean.numpy()).min() > 0


def test_cross_replica_context_is_refused_in_training_alone():
    strategy = strategy_for(2)
    layer = make_layer(make_case([(3, 4), (3, 4)]), strategy)
    x = tf.ones((3, 4))
    with strategy.scope():
        assert layer(x, training=False).shape == x.shape
        with pytest.raises(syncbn.NotSynchronizableError) as raised:
            layer(x, training=True)
    message = str(raised.value)
    assert "requires a replica context" in message
    assert (
        "Received: a call with training=True in the cross-replica context of MirroredStrategy"
        in message
    )
    assert "inside strategy.run(step, args=(batch,))" in message


def test_central_storage_strategy_is_refused():
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = syncbn.SyncBatchNormalization()
        layer.build((None, 4))
    with pytest.raises(syncbn.NotSynchronizableError) as raised:
        strategy.run(lambda: layer(tf.ones((3, 4)), training=True))
    assert "Received: CentralStorageStrategy" in str(raised.value)
    assert "Train under one of those" in str(raised.value)


def test_other_backends_are_refused_in_training(monkeypatch):
    layer = syncbn.SyncBatchNormalization()
    layer.build((None, 4))
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    with pytest.raises(syncbn.NotSynchronizableError, match="backend\\(\\)='openvino'"):
        layer.call(tf.ones((2, 4)), training=True)


def a_call_outside_of_run(layer, strategy, x):
    return layer(strategy.experimental_local_results(x)[0], training=True)


def a_py_function(layer, strategy, x):
    def replica(x):
        return tf.py_function(lambda z: layer(z, training=True), [x], tf.float32)

    return tf.function(lambda x: strategy.run(replica, args=(x,)), autograph=False)(x)


def a_dataset_map(layer, strategy, x):
    dataset = tf.data.Dataset.from_tensors(strategy.experimental_local_results(x)[0])
    return list(dataset.map(lambda z: layer(z, training=True)))


@pytest.mark.parametrize("call", [a_call_outside_of_run, a_py_function, a_dataset_map])
def test_a_layer_of_a_strategy_is_not_trained_outside_of_it(call):
    strategy = strategy_for(2)
    case = make_case([(9, 4), (4, 4)])
    layer = make_layer(case, strategy)
    # Within tf.py_function TensorFlow raises an error of its own, which quotes ours.
    with pytest.raises((syncbn.NotSynchronizableError, tf.errors.OpError)) as raised:
        call(layer, strategy, per_replica(strategy, case.parts))
    assert "Synchronized training of a layer made under" in str(raised.value)
    assert "with 2 replicas requires that strategy's replica context" in str(raised.value)
    assert not layer.moving_mean.numpy().any()


def test_a_layer_made_outside_of_the_scope_is_refused_on_replicas():
    strategy = strategy_for(2)
    case = make_case([(9, 4), (4, 4)])
    layer = make_layer(case, strategy_for(1))
    with pytest.raises(syncbn.NotSynchronizableError, match=r"inside `with strategy\.scope\(\):`"):
        strategy.run(lambda x: layer(x, training=True), args=(per_replica(strategy, case.parts),))


def test_vectorized_map_on_replicas_is_refused_before_it_hangs():
    strategy = strategy_for(2)
    case = make_case([(2, 9, 4), (2, 4, 4)])
    layer = make_layer(case._replace(parts=[p[0] for p in case.parts]), strategy)

    @tf.function(autograph=False)
    def step(x):
        return strategy.run(
            lambda x: tf.vectorized_map(lambda z: layer(z, training=True), x), args=(x,)
        )

    with pytest.raises(syncbn.NotSynchronizableError, match=r"tf\.vectorized_map"):
        step(per_replica(strategy, case.parts))


def test_forward_mode_differentiation_is_refused():
    case = make_case([(9, 4)])
    layer = make_layer(case, strategy_for(1))
    x = tf.constant(case.parts[0])
    with (
        pytest.raises(LookupError, match="requires reverse-mode differentiation"),
        tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator,
    ):
        accumulator.jvp(layer(x, training=True))


def test_a_gradient_through_vectorized_map_is_refused():
    case = make_case([(3, 9, 4)])
    layer = make_layer(case._replace(parts=[case.parts[0][0]]), strategy_for(1))
    x = tf.constant(case.parts[0])

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.vectorized_map(lambda z: layer(z, training=True), x)
        return tape.gradient(y, x, output_gradients=tf.constant(case.cotangents[0]))

    with pytest.raises(LookupError, match="requires reverse-mode differentiation"):
        gradient()
