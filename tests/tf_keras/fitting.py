"""A fit of tf_keras, here and on the workers of a cluster, each of which writes what it has."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from syncbn.tf_keras import SyncBatchNormalization


def compiled(precision: str, layer_class: Any = SyncBatchNormalization) -> Any:
    tf_keras.utils.set_random_seed(0)
    tf_keras.mixed_precision.set_global_policy(precision)
    result = "float64" if precision == "float64" else "float32"
    try:
        inputs = tf_keras.Input((4, 4, 2))
        x = tf_keras.layers.Conv2D(3, 2, use_bias=False)(inputs)
        x = layer_class(momentum=0.7)(x)
        x = tf_keras.layers.Activation("tanh")(x)
        x = tf_keras.layers.GlobalAveragePooling2D()(x)
        x = layer_class(momentum=0.5)(x)
        model = tf_keras.Model(inputs, tf_keras.layers.Dense(1, dtype=result)(x))
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    # A sum: tf_keras takes the mean of the replicas' means, which is another where their parts of
    # the batch differ in size.
    loss = tf_keras.losses.MeanSquaredError(reduction="sum")
    model.compile(tf_keras.optimizers.SGD(0.01, momentum=0.9), loss)
    return model


def fitted(
    precision: str, strategy: Any = None, layer_class: Any = SyncBatchNormalization
) -> dict[str, np.ndarray]:
    """Weights after two epochs."""
    return weights_of(fit(precision, strategy, layer_class))


def fit(precision: str, strategy: Any, layer_class: Any) -> Any:
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (19, 4, 4, 2))
    y = x.mean(axis=(1, 2, 3))[:, None]
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = policy
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = compiled(precision, layer_class)
    model.fit(data.with_options(options), epochs=2, verbose=0)
    return model


def weights_of(model: Any) -> dict[str, np.ndarray]:
    return {f"weight {number}": value for number, value in enumerate(model.get_weights())}


def main(folder: str) -> None:
    """As a worker: fit, save in two formats, load both."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index = strategy.cluster_resolver.task_id
    trained = fit("float64", strategy, SyncBatchNormalization)
    results = weights_of(trained)
    own = Path(folder) / str(index)  # each writes its own: none may need another for it
    own.mkdir()
    trained.save_weights(own / "checkpoint")
    trained.save_weights(own / "weights.h5")
    for name in ("checkpoint", "weights.h5"):
        with strategy.scope():
            model = compiled("float64")
        model.load_weights(own / name)
        results |= {f"{name} {number}": value for number, value in weights_of(model).items()}
    np.savez(Path(folder) / f"worker{index}.npz", **results)


if __name__ == "__main__":
    main(sys.argv[1])
