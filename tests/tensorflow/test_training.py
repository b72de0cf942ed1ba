"""Whole training: a hundred steps on replicas end at the weights of one device."""

import keras
import numpy as np
import pytest
from tests.replicas.tensorflow import strategy_for

import syncbn
from syncbn._backends.tensorflow.loop import ClassifierLoop

# float32 as the contract of the job has it; float64 shows that only rounding is between them.
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


def weights_after_a_hundred_steps(replicas, dtype, layer, examples=330):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 6, 6, 2)).astype(dtype)
    y = (x.mean(axis=(1, 2, 3)) > 0).astype("int32") + (x[:, 0, 0, 0] > 1)

    def make_model():
        keras.utils.set_random_seed(1)
        return keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                keras.layers.Conv2D(4, 3, use_bias=False, dtype=dtype),
                layer(momentum=0.9, dtype=dtype),
                keras.layers.Activation("tanh", dtype=dtype),
                keras.layers.Flatten(dtype=dtype),
                keras.layers.Dense(5, dtype=dtype),
                layer(momentum=0.9, dtype=dtype),
                keras.layers.Dense(3, activation="softmax", dtype=dtype),
            ]
        )

    loop = ClassifierLoop(strategy_for(replicas), make_model, lambda: keras.optimizers.SGD(0.05))
    steps = 0
    while steps < 100:
        # 330 = 10 · 32 + 10: every eleventh batch is ragged, and leaves replicas empty.
        for batch, size in loop.batches(x, y, rng.permutation(len(x)), 32):
            loop.step(batch, size)
            steps += 1
    return loop.weights()


def largest_difference(ours, reference):
    return max(np.abs(own - its).max() for own, its in zip(ours, reference, strict=True))


@pytest.fixture(scope="module")
def one_device():
    return {
        dtype: weights_after_a_hundred_steps(1, dtype, keras.layers.BatchNormalization)
        for dtype in TOLERANCE
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("replicas", [2, 4])
def test_a_hundred_steps_of_sgd_end_at_the_weights_of_one_device(replicas, dtype, one_device):
    ours = weights_after_a_hundred_steps(replicas, dtype, syncbn.SyncBatchNormalization)
    assert largest_difference(ours, one_device[dtype]) <= TOLERANCE[dtype]


def test_local_statistics_end_elsewhere():
    """The comparison can fail: plain batch normalization on two replicas does."""
    layer = keras.layers.BatchNormalization
    # Without an empty replica, of which plain batch normalization makes NaN.
    local, reference = (
        weights_after_a_hundred_steps(replicas, "float64", layer, examples=320)
        for replicas in (2, 1)
    )
    assert largest_difference(local, reference) > 1e-3


def test_mixed_float16_with_loss_scaling_trains_as_one_device():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 6)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")

    def make_model():
        keras.utils.set_random_seed(1)
        return keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, dtype="mixed_float16"),
                syncbn.SyncBatchNormalization(
                    momentum=0.9, activation="relu", dtype="mixed_float16"
                ),
                keras.layers.Dense(2, activation="softmax", dtype="float32"),
            ]
        )

    def train(replicas):
        loop = ClassifierLoop(
            strategy_for(replicas),
            make_model,
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05)),
        )
        for _ in range(5):
            for batch, size in loop.batches(x, y, np.arange(len(x)), 30):
                loop.step(batch, size)
        return loop.weights()

    one, start = train(1), make_model().get_weights()
    assert largest_difference(one, start) > 0.05
    # A few roundings of half precision, 5e-4 each; local statistics are 100 times as far off.
    assert largest_difference(train(3), one) < 2e-3


def test_an_overflow_on_one_replica_skips_the_step_on_all():
    """Keras's loss scaling asks each replica by itself, and would add its NaN to the others."""

    def make_model():
        return keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4, dtype="mixed_float16"),
                keras.layers.Dense(2, activation="softmax", dtype="float32"),
            ]
        )

    loop = ClassifierLoop(
        strategy_for(2),
        make_model,
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    )
    before = loop.weights()
    x = np.ones((4, 3), "float32")
    x[3] = np.inf  # in the part of the second replica
    y = np.array([0, 1, 0, 1])
    for batch, size in loop.batches(x, y, np.arange(4), 4):
        loop.step(batch, size)
    for own, its in zip(loop.weights(), before, strict=True):
        np.testing.assert_array_equal(own, its)
    for batch, size in loop.batches(np.ones((4, 3), "float32"), y, np.arange(4), 4):
        loop.step(batch, size)
    after = loop.weights()
    assert all(np.isfinite(weight).all() for weight in after)
    assert any((own != its).any() for own, its in zip(after, before, strict=True))
