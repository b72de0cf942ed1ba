"""Models that `verify` makes in processes of its own: functions that can be imported."""

import keras
import numpy as np

import syncbn


def build(normalization=syncbn.SyncBatchNormalization):
    layers = [
        keras.Input((6, 6, 3)),
        keras.layers.Conv2D(4, 3, name="conv"),
        normalization(name="norm"),
        keras.layers.ReLU(),
        keras.layers.Flatten(),
        keras.layers.Dense(2, name="last"),
    ]
    model = keras.Sequential(layers, name="net")
    model.compile("adam", "mse", metrics=["mae"])
    return model


def averaged():
    model = build()
    syncbn.average_gradients(model)
    return model


def plain():
    return build(keras.layers.BatchNormalization)


def data():
    random = np.random.default_rng(0)
    x = random.normal(2.0, 3.0, size=(9, 6, 6, 3)).astype("float32")
    return x, random.normal(size=(9, 2)).astype("float32")
