"""Moving statistics: cumulative, unbiased, frozen, and of a layer that is called several times."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests import oracle
from tests.harness import assert_close, make_case
from tests.replicas.tensorflow import local_results, make_layer, per_replica, strategy_for

import syncbn


def batches(sizes, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [rng.normal(step, 1 + step, (size, 3)).astype("f4") for size in sizes]
        for step in range(steps)
    ]


def make(replicas, **arguments):
    strategy = strategy_for(replicas)
    with strategy.scope():
        layer = syncbn.SyncBatchNormalization(**arguments)
        layer.build((None, 3))

    def train(parts, training=True):
        return strategy.run(
            lambda x: layer(x, training=training), args=(per_replica(strategy, parts),)
        )

    return layer, train


def assert_moved(layer, means, variances, tolerance=2e-6):
    assert_close("moving mean", layer.moving_mean.numpy(), means, tolerance)
    assert_close("moving variance", layer.moving_variance.numpy(), variances, tolerance)


@pytest.mark.parametrize("sizes", [(12,), (7, 4), (5, 0, 3)])
def test_momentum_none_is_the_average_of_all_batches(sizes):
    layer, train = make(len(sizes), momentum=None)
    seen = batches(sizes, 5)
    for number, parts in enumerate(seen, start=1):
        train(parts)
        wholes = [np.concatenate(p).astype("f8") for p in seen[:number]]
        assert_moved(
            layer, np.mean([w.mean(0) for w in wholes], 0), np.mean([w.var(0) for w in wholes], 0)
        )
    assert int(layer.num_batches_tracked.numpy()) == 5


def test_the_first_step_of_the_cumulative_average_is_the_batch_exactly():
    """Whatever the moving statistics were before: nothing of them is left, not even a rounding."""
    layer, train = make(2, momentum=None, moving_mean_initializer=keras.initializers.Constant(1e9))
    parts = [part * 1e-6 for part in batches((7, 4), 1)[0]]
    train(parts)
    assert_moved(
        layer, np.concatenate(parts).astype("f8").mean(0), np.concatenate(parts).astype("f8").var(0)
    )


@pytest.mark.parametrize("momentum", [0.9, None])
def test_frozen_phases_and_empty_batches_count_nothing(momentum):
    layer, train = make(2, momentum=momentum)
    first, frozen, empty, second = (
        *batches((7, 4), 2),
        batches((0, 0), 1)[0],
        batches((5, 6), 3)[2],
    )
    train(first)
    before = [w.numpy() for w in layer.weights]
    layer.trainable = False
    y = train(frozen)
    plain = (frozen[0] - layer.moving_mean.numpy()) / np.sqrt(layer.moving_variance.numpy() + 1e-3)
    strategy = strategy_for(2)
    assert_close("frozen outputs", local_results(strategy, y)[0], plain, 1e-5)
    layer.trainable = True
    train(empty)
    train(first, training=False)
    for own, its in zip([w.numpy() for w in layer.weights], before, strict=True):
        np.testing.assert_array_equal(own, its)
    train(second)
    mean, variance = np.zeros(3), np.ones(3)
    for number, parts in enumerate((first, second)):
        keep = number / (number + 1) if momentum is None else momentum
        whole = np.concatenate(parts).astype("f8")
        mean = oracle.moved(mean, whole.mean(0), keep)
        variance = oracle.moved(variance, whole.var(0), keep)
    assert_moved(layer, mean, variance)


@pytest.mark.parametrize("sizes", [(12,), (7, 4), (1,), (1, 1), (1, 0)])
def test_unbiased_moving_variance_is_torch_s(sizes):
    """n / (n − 1) by the global count; of one element, where torch refuses, the biased 0."""
    layer, train = make(len(sizes), momentum=0.9, unbiased_moving_variance=True)
    (parts,) = batches(sizes, 1)
    y = local_results(strategy_for(len(sizes)), train(parts))
    whole = np.concatenate(parts).astype("f8")
    unbiased = whole.var(0, ddof=1) if len(whole) > 1 else np.zeros(3)
    assert_moved(layer, 0.1 * whole.mean(0), 0.9 + 0.1 * unbiased)
    # Normalization itself is by the biased one, as everywhere.
    normalized = (whole - whole.mean(0)) / np.sqrt(whole.var(0) + 1e-3)
    assert_close("outputs", np.concatenate(y), normalized, 5e-6)


def test_unbiased_by_a_sum_of_weights_of_about_one_does_not_explode():
    """n − 1 of normalized weights is a rounding; Bessel's correction is for counts."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 3)).astype("f4")
    weights = rng.random(32).astype("f4")
    layer = syncbn.SyncBatchNormalization(momentum=0.0, unbiased_moving_variance=True)
    layer(x, training=True, weights=weights / weights.sum())
    mean = np.average(x.astype("f8"), axis=0, weights=weights)
    biased = np.average((x - mean) ** 2, axis=0, weights=weights)
    assert_close("moving variance", layer.moving_variance.numpy(), biased, 2e-6)


def test_without_the_argument_the_moving_variance_is_biased_as_keras_s():
    layer, train = make(1)
    keras_layer = keras.layers.BatchNormalization()
    (parts,) = batches((5,), 1)
    train(parts)
    keras_layer(parts[0], training=True)
    assert_moved(layer, keras_layer.moving_mean.numpy(), keras_layer.moving_variance.numpy())


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_call_of_a_shared_layer_in_one_step_counts_in_order(replicas, mode, momentum):
    """Siamese branches: the second call moves what the first has moved."""
    case = make_case([(4 + r, 3) for r in range(replicas)])._replace(momentum=momentum)
    strategy = strategy_for(replicas)
    layer = make_layer(case, strategy)
    shifts = (0.0, 5.0, -2.0)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.add_n(
                [tf.reduce_sum(layer(x * (1 + s) + s, training=True) ** 3) for s in shifts]
            )
        return tape.gradient(loss, x)

    def run(x):
        return strategy.run(step, args=(x,))

    run = tf.function(run, autograph=False) if mode == "graph" else run
    finals = set()
    for _ in range(3):
        start = [case.gamma, case.beta, np.zeros(3), np.ones(3), np.array(0)]
        layer.set_weights(start[: len(layer.weights)])
        run(per_replica(strategy, case.parts))
        copies = local_results(strategy, layer.moving_mean.value)
        assert len({copy.tobytes() for copy in copies}) == 1
        finals.add(copies[0].tobytes() + layer.moving_variance.numpy().tobytes())
    assert len(finals) == 1, "the same step ended at different statistics"
    whole = np.concatenate(case.parts).astype("f8")
    mean, variance = np.zeros(3), np.ones(3)
    for number, shift in enumerate(shifts):
        keep = number / (number + 1) if momentum is None else momentum
        branch = whole * (1 + shift) + shift
        mean, variance = (
            oracle.moved(mean, branch.mean(0), keep),
            oracle.moved(variance, branch.var(0), keep),
        )
    assert_moved(layer, mean, variance)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_renormalization_over_steps_on_replicas_is_that_of_one_device(momentum):
    """Its corrections come from its own moving statistics, which the steps before have moved."""
    clipping = {"rmax": 1.5, "rmin": 0.6, "dmax": 0.8}
    arguments = {"renorm": True, "renorm_clipping": clipping, "renorm_momentum": 0.7}
    layer, train = make(3, momentum=momentum, **arguments)
    expected, steps = Renormalized(momentum, clipping), batches((7, 0, 4), 4)
    for parts in steps:
        outputs = local_results(strategy_for(3), train(parts))
        its = expected.step(np.concatenate(parts).astype("f8"), renorm_momentum=0.7)
        assert_close("outputs", np.concatenate(outputs), its, 5e-6)
    assert_close("renorm mean", layer.renorm_mean.numpy(), expected.mean, 2e-6)
    assert_close("renorm deviation", layer.renorm_stddev.numpy(), expected.stddev, 2e-6)
    assert_moved(layer, expected.moving_mean, expected.moving_stddev**2 - 1e-3)
    for weight in (layer.renorm_mean, layer.renorm_stddev, layer.moving_stddev):
        copies = local_results(strategy_for(3), weight.value)
        assert len({copy.tobytes() for copy in copies}) == 1


class Renormalized:
    """Batch renormalization over several steps on one device, in float64."""

    def __init__(self, momentum, clipping):
        self.momentum, self.clipping, self.steps = momentum, clipping, 0
        self.mean, self.stddev = np.zeros(3), np.ones(3)
        self.moving_mean, self.moving_stddev = np.zeros(3), np.ones(3)

    def step(self, x, renorm_momentum):
        renorm = oracle.Renorm(self.mean, self.stddev, **self.clipping)
        ones, zeros = np.ones(3), np.zeros(3)
        result = oracle.batch_normalization([x], [x], -1, ones, zeros, 1e-3, renorm=renorm)
        stddev = np.sqrt(result.variance + 1e-3)
        keep = self.steps / (self.steps + 1) if self.momentum is None else self.momentum
        self.steps += 1
        self.mean = oracle.moved(self.mean, result.mean, renorm_momentum)
        self.stddev = oracle.moved(self.stddev, stddev, renorm_momentum)
        self.moving_mean = oracle.moved(self.moving_mean, result.mean, keep)
        self.moving_stddev = oracle.moved(self.moving_stddev, stddev, keep)
        return result.outputs[0]


def test_batches_are_counted_beyond_what_a_float_could_count():
    layer, train = make(1, momentum=None)
    layer.num_batches_tracked.assign(2**24)
    train(batches((4,), 1)[0])
    assert int(layer.num_batches_tracked.numpy()) == 2**24 + 1
