"""Kinds of batches, of models and of steps."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.distribute.cross_device_utils import CollectiveKeys

import syncbn
from tests.scenarios.models import (
    classes,
    compile_model,
    dense_model,
    fit,
    normal,
    observe_model,
    set_weights,
    targets,
)
from tests.scenarios.scenario import FEW, REPLICAS, scenario
from tests.scenarios.world import World


@scenario(covers=["fit of arrays", "validation data", "order of predictions"])
def arrays(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae", keras.metrics.RootMeanSquaredError()])
    return fit(
        model,
        normal(128, 6),
        targets(128),
        validation_data=(normal(33, 6, seed=3), targets(33, seed=4)),
        predict=normal(37, 6, seed=5),
    )


@scenario(covers=["an empty replica", "ragged last batch"], core=FEW, repairs=["loss"])
def last_batch_of_one(world: World) -> Any:
    return fit(dense_model(world, metrics=lambda: ["mae"]), normal(65, 6), targets(65))


@scenario(covers=["ragged last batch", "building from unequal parts"])
def batches_of_65(world: World) -> Any:
    return fit(dense_model(world), normal(130, 6), targets(130), batch_size=65)


@scenario(covers=["ragged last batch", "building from unequal parts"])
def batches_of_seven(world: World) -> Any:
    return fit(dense_model(world), normal(30, 6), targets(30), batch_size=7)


@scenario(covers=["sample weights", "ragged last batch", "weighted metrics"], core=REPLICAS)
def sample_weights(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae"], weighted_metrics=lambda: ["mse"])
    weights = np.abs(normal(65, seed=8))
    validation = (normal(33, 6, seed=3), targets(33, seed=4), np.abs(normal(33, seed=9)))
    x, y = normal(65, 6), targets(65)
    return fit(model, x, y, sample_weight=weights, validation_data=validation)


@scenario(covers=["class weights", "ragged last batch"])
def class_weights(world: World) -> Any:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = dense_model(world, units=3, loss=loss, metrics=lambda: ["accuracy"])
    return fit(model, normal(65, 6), classes(65), class_weight={0: 0.5, 1: 2.0, 2: 1.3})


@scenario(covers=["validation split"])
def validation_split(world: World) -> Any:
    return fit(dense_model(world), normal(100, 6), targets(100), validation_split=0.35)


@scenario(covers=["evaluate of ragged data", "predict of ragged data"], core=FEW)
def evaluate_and_predict(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae", "mse"])
    x, y = normal(65, 6), targets(65)
    weights = np.abs(normal(65, seed=8))
    logs = model.evaluate(x, y, sample_weight=weights, batch_size=64, verbose=0, return_dict=True)
    return {
        **logs,
        "predicted": model.predict(x, batch_size=64, verbose=0),
        "of 7": model.predict(x[:30], batch_size=7, verbose=0),
        "of 1": model.predict(x[:3], batch_size=1, verbose=0),
    }


@scenario(covers=["steps_per_execution"], core=REPLICAS, repairs=["steps"])
def steps_per_execution(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae"], steps_per_execution=3)
    x, y = normal(113, 6), targets(113)
    observed = dict(fit(model, x, y, batch_size=16, validation_data=(x[:33], y[:33])))
    observed["predicted"] = model.predict(x, batch_size=16, verbose=0)
    return observed


@scenario(covers=["run_eagerly"])
def run_eagerly(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae"], run_eagerly=True)
    return fit(model, normal(65, 6), targets(65), epochs=1)


@scenario(covers=["an unbuilt model"])
def unbuilt(world: World) -> Any:
    keras.utils.set_random_seed(3)
    with world.scope():
        model = keras.Sequential(
            [
                keras.layers.Dense(
                    4, use_bias=False, kernel_initializer=keras.initializers.GlorotUniform(5)
                ),
                syncbn.SyncBatchNormalization(),
                keras.layers.Dense(2, kernel_initializer=keras.initializers.GlorotUniform(6)),
            ]
        )
        compile_model(model)
    return fit(model, normal(65, 6), targets(65))


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        glorot = keras.initializers.GlorotUniform
        # A bias before a normalization has a gradient of 0, and rounding is all that moves it.
        self.first = keras.layers.Dense(4, use_bias=False, kernel_initializer=glorot(5))
        self.norm = syncbn.SyncBatchNormalization()
        self.last = keras.layers.Dense(2, kernel_initializer=glorot(6))

    def call(self, x: Any, training: bool = False) -> Any:
        return self.last(keras.ops.tanh(self.norm(self.first(x), training=training)))


@scenario(covers=["a subclassed model"])
def subclassed(world: World) -> Any:
    with world.scope():
        model = Subclassed()
        compile_model(model, metrics=lambda: ["mae"])
    return fit(model, normal(65, 6), targets(65), predict=normal(9, 6, seed=3))


def _convolutional(size: int, use_bias: bool) -> Any:
    def run(world: World) -> Any:
        with world.scope():
            model = keras.Sequential(
                [
                    keras.Input((6, 6, 2)),
                    keras.layers.Conv2D(4, 3, use_bias=use_bias),
                    syncbn.SyncBatchNormalization(),
                    keras.layers.Activation("relu"),
                    keras.layers.GlobalAveragePooling2D(),
                    keras.layers.Dense(3),
                ]
            )
            set_weights(model)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            compile_model(model, loss=loss, metrics=lambda: ["accuracy"])
        return fit(model, normal(size, 6, 6, 2), classes(size))

    return run


scenario(name="convolution", covers=["a convolutional model"])(_convolutional(100, True))
scenario(name="convolution[empty replica]", covers=["an empty replica"])(_convolutional(65, False))
scenario(
    name="convolution[empty replica with bias]",
    covers=["an empty replica: oneDNN's gradient of a filter with a bias"],
    worlds=("one", "one_repaired", "mirrored2", "mirrored4"),
    error=("UnsupportedFeatureError", "oneDNN.*TF_ENABLE_ONEDNN_OPTS=0"),
)(_convolutional(65, True))


@scenario(
    covers=["train_on_batch", "test_on_batch", "predict_on_batch"],
    core=REPLICAS,
    repairs=["predictions", "steps"],
)
def on_batch(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae"])
    x, y = normal(31, 6), targets(31)
    observed = {}
    for step in range(2):
        logs = model.train_on_batch(x, y, return_dict=True)
        observed |= {f"train {name} {step}": value for name, value in logs.items()}
    logs = model.test_on_batch(x[:7], y[:7], return_dict=True)
    observed |= {f"test {name}": value for name, value in logs.items()}
    observed["predicted"] = model.predict_on_batch(x)
    return observed | observe_model(model)


@scenario(covers=["train_on_batch", "sample weights"])
def on_batch_with_weights(world: World) -> Any:
    model = dense_model(world, weighted_metrics=lambda: ["mae"])
    x, y, weights = normal(31, 6), targets(31), np.abs(normal(31, seed=8))
    logs = model.train_on_batch(x, y, sample_weight=weights, return_dict=True)
    return {**logs, **observe_model(model)}


@scenario(
    covers=["shuffling without a seed"], core=FEW, repairs=["shuffling"], witnesses=("workers2x1",)
)
def shuffled(world: World) -> Any:
    """Every example once an epoch, whatever worker has it, in another order each epoch."""
    with world.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        # The gradient of each step is the sum of its examples, each a power of two.
        loss = keras.losses.MeanAbsoluteError(reduction="sum")
        compile_model(model, loss=loss, optimizer=lambda: keras.optimizers.SGD(1.0))
    model.layers[0].kernel.assign([[0.0]])
    steps: list[float] = []

    def note(batch: int, logs: Any) -> None:  # noqa: ARG001 - called by name
        steps.append(float(np.array(model.layers[0].kernel).item()))

    x = (2.0 ** np.arange(16)).astype("float32")[:, None]
    # With a seed Keras draws the same order for every epoch, on one device at least.
    tf.random.set_seed(None)
    random.seed()
    model.fit(
        x,
        np.full((16, 1), 1e30, "float32"),
        batch_size=4,
        epochs=2,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=note)],
    )
    sizes = np.diff([0.0, *steps])
    first, second = sizes[:4], sizes[4:]
    return {
        "sum of each epoch": [first.sum(), second.sum()],
        "examples of a step": [bin(int(size)).count("1") for size in sizes],
        "epochs differ": sorted(first) != sorted(second),
    }


@scenario(covers=["batch logs on a ragged step"], core=REPLICAS, repairs=["steps"])
def batch_logs(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae"])
    seen: list[list[float]] = []

    def note(_: int, logs: Any) -> None:
        seen.append([logs["loss"], logs["mae"]])

    class Noting(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            note(batch, logs)

        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            note(batch, logs)

    x, y = normal(75, 6), targets(75)
    fit(model, x, y, batch_size=33, callbacks=[Noting()], validation_data=(x[:34], y[:34]))
    return {"logs": seen}


@scenario(
    covers=["predict of one scalar a batch"],
    repairs=["predictions"],
    error=("UnsupportedFeatureError", "axis of examples"),
)
def scalar_predictions(world: World) -> Any:
    with world.scope():
        inputs = keras.Input((6,))
        model = keras.Model(inputs, keras.ops.mean(inputs))
    return {"predicted": model.predict(normal(64, 6), batch_size=32, verbose=0)}


@scenario(
    covers=["jit_compile"],
    error=("UnsupportedFeatureError", "jit_compile"),
    repairs=["steps"],
)
def jit_compile(world: World) -> Any:
    model = dense_model(world, normalized=False, jit_compile=True)
    return fit(model, normal(64, 6), targets(64), epochs=1, observe=False)


@scenario(
    covers=["compile outside the scope"],
    error=("InputError", "scope"),
    repairs=["scopes"],
)
def compile_outside_the_scope(world: World) -> Any:
    with world.scope():
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
        set_weights(model)
    compile_model(model, optimizer=lambda: keras.optimizers.SGD(0.1, momentum=0.9))
    return fit(model, normal(64, 6), targets(64))


@scenario(covers=["build outside the scope"], error=("InputError", "scope"))
def model_outside_the_scope(world: World) -> Any:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    set_weights(model)
    with world.scope():
        compile_model(model, metrics=lambda: ["mae"])
        return fit(model, normal(64, 6), targets(64))


@scenario(
    covers=["plain batch normalization", "average_moving_statistics"],
    repairs=["local-statistics"],
)
def averaged_moving_statistics(world: World) -> Any:
    """Of the data itself, so that they do not depend on what local statistics do to training."""
    with world.scope():
        norm = keras.layers.BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.Input((6,)), norm, keras.layers.Dense(2)])
        set_weights(model)
        compile_model(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, 3 + normal(128, 6), targets(128))
    warned = [str(one.message) for one in caught if "normalizes each of" in str(one.message)]
    if world.replicas > 1:
        syncbn.average_moving_statistics(model)
    # The mean of the parts' variances lacks what their means vary by.
    return {
        "moving mean": np.array(norm.moving_mean),
        "warned once, by name": [norm.name in text for text in warned] == [True]
        if world.replicas > 1
        else True,
        "variance is near one": np.abs(np.array(norm.moving_variance) - 1).max() < 0.3,
    }


@scenario(
    covers=["TensorFlow's timeouts: a thread that sleeps for every collective"],
    worlds=("one", "workers2x1"),
)
def threads(world: World) -> Any:
    """40 steps of five collectives leave no threads behind."""
    model = dense_model(world)
    fit(model, normal(64, 6), targets(64), batch_size=32, epochs=2)
    before = len(list(Path("/proc/self/task").iterdir()))
    fit(model, normal(64, 6), targets(64), batch_size=32, epochs=20)
    return {"no more than before": len(list(Path("/proc/self/task").iterdir())) < before + 50}


@scenario(
    covers=["memory that grows with every step"],
    repairs=["instance-keys"],
    core=("one", "workers2x1"),
)
def numbers_of_collectives(world: World) -> Any:
    """Each new number is a record that TensorFlow keeps: more steps must not take more of them."""
    given = [0]
    original = CollectiveKeys.get_instance_key

    def counted(keys: Any, *place: Any) -> Any:
        given[0] += 1
        return original(keys, *place)

    model = dense_model(world, metrics=lambda: ["mae"])
    CollectiveKeys.get_instance_key = counted
    try:
        counts = []
        for steps in (2, 2, 8):
            before = given[0]
            model.fit(normal(64 * steps, 6), targets(64 * steps), batch_size=64, verbose=0)
            counts.append(given[0] - before)
    finally:
        CollectiveKeys.get_instance_key = original
    return {"more": counts[2] - counts[1]}
