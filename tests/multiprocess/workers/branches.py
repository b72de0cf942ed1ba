"""A worker that trains a model of `keras.applications` for a few steps, its layers synchronized."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import syncbn
from tests.replicas.tensorflow import per_replica

# By name: the smallest input it takes, and how many batch normalizations it has.
APPLICATIONS = {"InceptionV3": (75, 94), "EfficientNetB0": (32, 49), "DenseNet121": (32, 121)}
STEPS = 3
EXAMPLES = (2, 3)  # of each worker


def eight_branches() -> keras.Model:
    """Eight branches of different depths side by side, as in an Inception block, and all joined."""
    inputs = keras.Input((8, 8, 3))
    branches = []
    for branch in range(8):
        x = inputs
        for _ in range(1 + branch % 3):
            x = keras.layers.Conv2D(4 + branch, 3, padding="same", use_bias=False)(x)
            x = keras.layers.BatchNormalization()(x)
        branches.append(keras.layers.Activation("relu")(x))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Concatenate()(branches))
    return keras.Model(inputs, keras.layers.Dense(4)(x))


def make_model(name: str) -> keras.Model:
    if name == "branches":
        return eight_branches()
    size, _ = APPLICATIONS[name]
    return getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=4, classifier_activation=None
    )


def synchronized(model: keras.Model) -> keras.Model:
    """The same model with the layer in place of every BatchNormalization."""

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        if type(layer) is keras.layers.BatchNormalization:
            return syncbn.SyncBatchNormalization.from_config(layer.get_config())
        return layer.__class__.from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=clone)


def main(name: str, folder: Path) -> None:
    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=tf.distribute.experimental.CommunicationOptions(
            implementation=tf.distribute.experimental.CommunicationImplementation.RING,
            timeout_seconds=200,
        )
    )
    worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    rng = np.random.default_rng(0)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = synchronized(make_model(name))
        optimizer = keras.optimizers.SGD(0.01)
        optimizer.build(model.trainable_variables)

    def replica(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
            loss = tf.reduce_sum(losses) / sum(EXAMPLES)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return loss

    run = tf.function(lambda x, y: strategy.run(replica, args=(x, y)), autograph=False)
    losses = []
    for _ in range(STEPS):
        parts = [rng.normal(size=(n, *model.input_shape[1:])).astype("f4") for n in EXAMPLES]
        labels = [rng.integers(0, 4, n) for n in EXAMPLES]
        loss = run(per_replica(strategy, parts), per_replica(strategy, labels))
        losses.append(float(strategy.reduce("SUM", loss, axis=None)))
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, syncbn.SyncBatchNormalization)
    ]
    np.savez(
        folder / f"worker{worker}.npz",
        *model.get_weights(),
        losses=losses,
        layers=len(layers),
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
