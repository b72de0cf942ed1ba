"""Layers on TensorFlow: ours on Keras 3, and tf_keras's, the Keras 2 that is kept for old code."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
import tensorflow as tf
from serve import CORES, Made, arrays, serve

DEVICES = 2


def syncbn_layer() -> Any:
    """Ours."""
    import syncbn

    return syncbn.SyncBatchNormalization()


def tf_keras_layer(**arguments: Any) -> Any:
    """tf_keras's; `synchronized` is what SyncBatchNormalization of TensorFlow 2.2 has become."""
    import tf_keras

    return tf_keras.layers.BatchNormalization(**arguments)


VARIANTS: dict[str, Callable[[], Any]] = {
    "syncbn": syncbn_layer,
    "tf_keras_sync": lambda: tf_keras_layer(synchronized=True),
    "tf_keras_local": tf_keras_layer,
}
STRATEGIES: dict[int, Any] = {}


def strategy_of(replicas: int) -> Any:
    """A MirroredStrategy, one a process: a second would meet the first one's collectives."""
    if replicas not in STRATEGIES:
        STRATEGIES[replicas] = (
            tf.distribute.get_strategy()
            if replicas == 1
            else tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
        )
    return STRATEGIES[replicas]


def make(variant: str, shape: list[int], replicas: int) -> Made:
    """A compiled forward and backward of the layer on every replica."""
    strategy = strategy_of(replicas)
    inputs, cotangents = (
        strategy.experimental_distribute_values_from_function(part(array, replicas))
        for array in arrays(shape, replicas)
    )
    with strategy.scope():
        layer = VARIANTS[variant]()
        layer.build((None, *shape[1:]))

    def replica_step(x: Any, dy: Any) -> Any:
        # Keras 3 wraps TensorFlow's variable in one of its own, tf_keras does not.
        weights = [w if isinstance(w, tf.Variable) else w.value for w in (layer.gamma, layer.beta)]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, [x, *weights], output_gradients=dy)

    def step(x: Any, dy: Any) -> Any:
        return strategy.run(replica_step, args=(x, dy))

    compiled = tf.function(step)

    def run() -> Any:
        y, gradients = compiled(inputs, cotangents)
        for value in strategy.experimental_local_results(gradients[1]):
            value.numpy()
        return y, gradients

    def results() -> list[np.ndarray]:
        y, (dx, dgamma, dbeta) = run()
        parts = [strategy.experimental_local_results(values) for values in (y, dx, dgamma, dbeta)]
        whole = [np.concatenate([part.numpy() for part in values]) for values in parts[:2]]
        return whole + [sum(part.numpy() for part in values) for values in parts[2:]]

    return Made(run, results)


def part(array: np.ndarray, replicas: int) -> Callable[[Any], Any]:
    """What gives each replica its part of the array."""
    parts = np.split(array, replicas)
    return lambda context: tf.constant(parts[context.replica_id_in_sync_group])


if __name__ == "__main__":
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * DEVICES,
    )
    versions = {"tensorflow": tf.__version__}
    for name in ("syncbn", "keras", "tf_keras"):
        if any(metadata.packages_distributions().get(name, [])):
            versions[name] = metadata.version(name)
    serve(make, versions=versions, threads=CORES, accelerator=None)
