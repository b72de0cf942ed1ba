"""A model that was trained with the layer, and the same one with Keras's, to be exported."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

import syncbn

# No multiple of the batch that exporters trace with.
X = np.random.default_rng(0).normal(2, 3, size=(6, 6, 6, 3)).astype("f4")


def made_with(norm: type) -> Any:
    return keras.Sequential(
        [
            keras.Input((6, 6, 3), name="image"),
            layers.Conv2D(4, 3),
            norm(momentum=0.5),
            layers.ReLU(),
            norm(momentum=0.5),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )


def trained(model: Any) -> Any:
    """After a step, so that no statistic is what it was made."""
    before = model.get_weights()
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((len(X), 2), "f4"), batch_size=len(X), verbose=0)
    assert all((own != its).any() for own, its in zip(model.get_weights(), before, strict=True))
    return model


def plain(model: Any) -> Any:
    """The same model with Keras's layer."""
    other = made_with(layers.BatchNormalization)
    other.set_weights(model.get_weights())
    return other


def synchronized() -> Any:
    return made_with(syncbn.SyncBatchNormalization)
