"""Where the layer works: strategies, traces, Keras's fit."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.harness import assert_close, assert_equals_one_device, make_case, observe
from tests.replicas.tensorflow import (
    local_results,
    make_layer,
    make_step,
    per_replica,
    strategy_for,
)

import syncbn


@pytest.mark.parametrize("replicas", range(1, 9))
def test_mirrored_strategy_with_one_to_eight_replicas(replicas):
    case = make_case([(3 + 2 * r, 4) for r in range(replicas)])
    if replicas == 1:
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        layer = make_layer(case, strategy)
        y = strategy.run(lambda x: layer(x, training=True), args=(tf.constant(case.parts[0]),))
        assert_close("outputs", y, case.expected().outputs[0], 2e-6)
    else:
        assert_equals_one_device(case, observe(case), 2e-6)


def test_one_device_strategy():
    case = make_case([(9, 4)])
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    layer = make_layer(case, strategy)
    x, dy = tf.constant(case.parts[0]), tf.constant(case.cotangents[0])
    y, dx, _ = tf.function(lambda: strategy.run(make_step(layer), args=(x, dy)))()
    assert_close("outputs", y, case.expected().outputs[0], 2e-6)
    assert_close("input gradients", dx, case.expected().input_gradients[0], 2e-6)


@pytest.mark.parametrize(
    "cross_device_ops",
    [tf.distribute.ReductionToOneDevice, tf.distribute.HierarchicalCopyAllReduce],
)
def test_any_way_to_reduce_across_devices(cross_device_ops):
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=cross_device_ops()
    )
    case = make_case([(33, 4), (32, 4)])
    layer = make_layer(case, strategy)
    y = strategy.run(lambda x: layer(x, training=True), args=(per_replica(strategy, case.parts),))
    for own, its in zip(local_results(strategy, y), case.expected().outputs, strict=True):
        assert_close("outputs", own, its, 2e-6)


def test_replicas_that_were_traced_with_different_knowledge_of_their_shapes():
    """TensorFlow traces a ragged batch with known sizes on one replica and unknown on another."""
    strategy = strategy_for(2)
    layer = make_layer(make_case([(8, 4), (8, 4)]), strategy)
    step = make_step(layer)
    run = tf.function(
        lambda x, dy: strategy.run(step, args=(x, dy)), reduce_retracing=True, autograph=False
    )
    for sizes in [(8, 8), (8, 5), (8, 3), (2, 8)]:
        case = make_case([(size, 4) for size in sizes])._replace(gamma=np.ones(4), beta=np.zeros(4))
        layer.gamma.assign(case.gamma)
        layer.beta.assign(case.beta)
        y, dx, _ = run(per_replica(strategy, case.parts), per_replica(strategy, case.cotangents))
        expected = case.expected()
        for replica in range(2):
            assert_close(
                "outputs", local_results(strategy, y)[replica], expected.outputs[replica], 2e-6
            )
            assert_close(
                "input gradients",
                local_results(strategy, dx)[replica],
                expected.input_gradients[replica],
                2e-6,
            )


def test_a_loop_around_strategy_run_moves_the_statistics_each_time():
    strategy = strategy_for(2)
    case = make_case([(9, 4), (4, 4)])
    layer = make_layer(case, strategy)

    @tf.function
    def three_steps(x):
        for _ in tf.range(3):
            strategy.run(lambda x: layer(x, training=True), args=(x,))

    three_steps(per_replica(strategy, case.parts))
    expected = case.expected().mean * (1 - case.momentum**3)
    assert_close("moving mean", layer.moving_mean.numpy(), expected, 2e-6)


def fit(strategy, layer, **compile_arguments):
    rng = np.random.default_rng(0)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3), layer(), keras.layers.Dense(1)]
        )
        model.compile("sgd", "mse", **compile_arguments)
    x = rng.normal(size=(64, 4)).astype("f4")
    model.fit(x, x[:, :1], batch_size=8, epochs=1, verbose=0, shuffle=False)
    return model


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_keras_fit_under_mirrored_strategy_equals_one_device(run_eagerly):
    def difference(layer):
        models = []
        for replicas in (1, 2):
            keras.utils.set_random_seed(0)
            models.append(fit(strategy_for(replicas), layer, run_eagerly=run_eagerly))
        weights = zip(*(model.get_weights() for model in models), strict=True)
        return max(np.abs(own - its).max() for own, its in weights)

    if difference(keras.layers.LayerNormalization) > 1e-5:
        pytest.skip("before Keras 3.8 fit itself takes other steps on replicas, with any layer")
    assert difference(syncbn.SyncBatchNormalization) < 1e-5


def test_steps_per_execution_works_on_one_device():
    model = fit(strategy_for(1), syncbn.SyncBatchNormalization, steps_per_execution=4)
    assert np.abs(model.layers[1].moving_mean.numpy()).min() > 0


def test_steps_per_execution_under_a_strategy_is_refused_with_the_remedy():
    try:
        fit(strategy_for(2), keras.layers.LayerNormalization, steps_per_execution=4)
        keras_can = True
    except tf.errors.InvalidArgumentError:
        keras_can = False  # what Keras 3.15.1 does with any layer
    if keras_can:
        pytest.skip("Keras before 3.7 unrolls the steps, and they work")
    with pytest.raises(syncbn.NotSynchronizableError, match="Set steps_per_execution=1"):
        fit(strategy_for(2), syncbn.SyncBatchNormalization, steps_per_execution=4)


def test_a_model_is_built_in_the_scope_also_with_training_true():
    strategy = strategy_for(2)
    with strategy.scope():
        inputs = keras.Input((4,))
        model = keras.Model(inputs, syncbn.SyncBatchNormalization()(inputs, training=True))
    assert model.output_shape == (None, 4)
    assert not model.layers[1].moving_mean.numpy().any()


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.normalization = syncbn.SyncBatchNormalization()

    def call(self, inputs, training=False):  # noqa: ARG002
        return self.normalization(inputs, training=True)


def test_a_subclassed_model_is_built_by_shapes_in_the_scope():
    with strategy_for(2).scope():
        model = Subclassed()
        spec = keras.KerasTensor((None, 4))
        assert model.compute_output_spec(spec).shape == (None, 4)
