"""Losses, their reductions, masks, penalties and custom steps."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import syncbn
from tests.scenarios.models import (
    compile_model,
    dense_model,
    fit,
    normal,
    set_weights,
    targets,
)
from tests.scenarios.scenario import REPLICAS, scenario
from tests.scenarios.world import World

REDUCTIONS = ["sum", "none", "mean", "mean_with_sample_weight", "sum_over_batch_size"]


def _reduction(reduction: str) -> Any:
    def run(world: World) -> Any:
        loss = keras.losses.MeanSquaredError(reduction=reduction)
        optimizer = keras.optimizers.SGD
        rate = 0.005 if reduction in ("sum", "none") else 0.1
        model = dense_model(world, loss=loss, optimizer=lambda: optimizer(rate))
        weights = np.abs(normal(65, seed=8))
        return fit(model, normal(65, 6), targets(65), sample_weight=weights)

    return run


for _name in REDUCTIONS:
    scenario(
        name=f"reduction[{_name}]",
        covers=["ragged last batch", f"reduction {_name}"],
    )(_reduction(_name))


@scenario(covers=["reduction sum", "metrics of a sum"])
def sum_without_weights(world: World) -> Any:
    loss = keras.losses.MeanSquaredError(reduction="sum")
    model = dense_model(world, loss=loss, optimizer=lambda: keras.optimizers.SGD(0.005))
    return fit(model, normal(65, 6), targets(65), validation_data=(normal(9, 6), targets(9)))


@scenario(covers=["a loss function that returns a scalar"], core=REPLICAS, repairs=["loss"])
def scalar_loss(world: World) -> Any:
    """Of full batches: of a ragged one nobody but the function knows what it averages over."""

    def loss(y: Any, predicted: Any) -> Any:
        return ops.mean(ops.square(y - predicted))

    model = dense_model(world, loss=loss, metrics=lambda: ["mae"])
    return fit(model, normal(128, 6), targets(128))


@scenario(covers=["a loss function that returns a scalar", "weight regularizers"])
def weight_regularizers(world: World) -> Any:
    regularizer = keras.regularizers.L2(0.05)
    layers = (lambda: keras.layers.Dense(4, kernel_regularizer=regularizer),)
    return fit(dense_model(world, layers=layers), normal(65, 6), targets(65))


@scenario(
    covers=["activity regularizers", "losses of the replicas' threads"],
    repairs=["additional-losses"],
)
def activity_regularizers(world: World) -> Any:
    """Keras divides the penalty by the batch's size, so that it is a mean over examples."""
    regularizer = keras.regularizers.L2(0.05)
    layers = (lambda: keras.layers.Dense(4, activity_regularizer=regularizer),)
    return fit(dense_model(world, layers=layers), normal(128, 6), targets(128))


@scenario(covers=["activity regularizers", "ragged last batch"])
def activity_regularizers_of_ragged_batches(world: World) -> Any:
    regularizer = keras.regularizers.L2(0.05)
    layers = (lambda: keras.layers.Dense(4, activity_regularizer=regularizer),)
    return fit(dense_model(world, layers=layers), normal(65, 6), targets(65))


@keras.saving.register_keras_serializable("tests")
class Penalty(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        self.add_loss(0.05 * ops.mean(ops.square(x)))
        return x


@scenario(
    covers=["add_loss", "losses of the replicas' threads"],
    core=REPLICAS,
    repairs=["additional-losses"],
)
def add_loss(world: World) -> Any:
    layers = (Penalty, lambda: keras.layers.Dense(4), Penalty)
    return fit(dense_model(world, layers=layers), normal(128, 6), targets(128))


def _sequences(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of very unequal lengths, so that every replica has another number that counts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, size=(65, 5))
    lengths = np.concatenate([rng.integers(1, 3, size=32), rng.integers(3, 6, size=33)])
    tokens[np.arange(5)[None] >= lengths[:, None]] = 0
    return tokens, normal(65, 5, 2, seed=seed + 1)


def _masked(world: World, **compiled: Any) -> Any:
    with world.scope():
        model = keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                keras.layers.Embedding(9, 4, mask_zero=True),
                syncbn.SyncBatchNormalization(),
                keras.layers.Dense(2),
            ]
        )
        set_weights(model)
        compile_model(model, **compiled)
    return model


@scenario(covers=["masked losses with unequal masks"], core=REPLICAS, repairs=["loss"])
def masks(world: World) -> Any:
    model = _masked(world, metrics=lambda: ["mae"], weighted_metrics=lambda: ["mse"])
    return fit(model, *_sequences(), validation_data=_sequences(5))


@scenario(covers=["masked losses with unequal masks", "mean_with_sample_weight"])
def masks_and_weights(world: World) -> Any:
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    model = _masked(world, loss=loss, weighted_metrics=lambda: ["mae"])
    x, y = _sequences()
    return fit(model, x, y, sample_weight=np.abs(normal(65, 1, seed=8)))


@scenario(covers=["masked losses with unequal masks", "recurrent layers"])
def masking_layer(world: World) -> Any:
    x = normal(65, 4, 3)
    x[:30, 2:] = 0
    x[40:, 3:] = 0
    with world.scope():
        layers = [keras.layers.Masking(), keras.layers.SimpleRNN(3, return_sequences=True)]
        model = keras.Sequential([keras.Input((4, 3)), *layers, keras.layers.Dense(2)])
        set_weights(model)
        compile_model(model)
    return fit(model, x, normal(65, 4, 2, seed=1))


class OwnStep(keras.Model):
    """`train_step` as Keras's guides write it; `how` says whose loss it takes and returns."""

    how = "compute_loss"
    own_loss = keras.losses.MeanSquaredError()

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            if self.how == "own":
                loss = self.own_loss(y, predicted)
            else:
                loss = self.compute_loss(x=x, y=y, y_pred=predicted)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        for metric in self.metrics:
            if metric.name != "loss":
                metric.update_state(y, predicted)
            elif self.how == "guide":
                metric.update_state(loss)
        if self.how == "guide":
            return {metric.name: metric.result() for metric in self.metrics}
        return {"own": loss}


def _own_step(how: str, size: int) -> Any:
    def run(world: World) -> Any:
        with world.scope():
            inputs = keras.Input((6,))
            hidden = syncbn.SyncBatchNormalization()(keras.layers.Dense(5)(inputs))
            model = OwnStep(inputs, keras.layers.Dense(2)(hidden))
            model.how = how
            set_weights(model)
            compile_model(model, metrics=lambda: ["mae"])
        return fit(model, normal(size, 6), targets(size))

    return run


for _how in ("guide", "compute_loss", "own"):
    scenario(name=f"train_step[{_how}]", covers=["custom train_step", "its own loss"])(
        _own_step(_how, 65)
    )


@scenario(covers=["dropout, the same mask on every replica"], core=REPLICAS, repairs=["seeds"])
def dropout(world: World) -> Any:
    """Not what one device draws, but another mask for every example, at the right rate."""
    with world.scope():
        inputs = keras.Input((256,))
        model = keras.Model(inputs, keras.layers.Dropout(0.5, seed=3)(inputs))
        model.compile(optimizer="sgd")

    def call(x: Any) -> Any:
        return model(x, training=True)

    x = np.ones((8, 256), "float32")
    if world.strategy is None:
        drawn = np.array(call(tf.constant(x)))
    else:
        dataset = tf.data.Dataset.from_tensor_slices(x).batch(8)
        batch = next(iter(world.strategy.experimental_distribute_dataset(dataset)))
        outputs = tf.function(lambda: world.strategy.run(call, args=(batch,)))()
        drawn = np.array(world.strategy.gather(outputs, axis=0))
    rows = {row.tobytes() for row in drawn}
    return {
        "different masks": len(rows),
        "rate is near a half": abs((drawn > 0).mean() - 0.5) < 0.05,
        "scaled": np.unique(drawn),
    }
