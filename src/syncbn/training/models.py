"""The models of the main job, with the normalization as a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from syncbn.layer import SyncBatchNormalization

__all__ = ["MODELS", "NORMALIZATIONS", "build"]

# Keras's 0.99 remembers about a hundred steps, more than an epoch of the digits has.
MOMENTUM = 0.9

NORMALIZATIONS: dict[str, Callable[..., Any]] = {
    "sync": SyncBatchNormalization,
    "local": keras.layers.BatchNormalization,
    "keras": lambda **arguments: keras.layers.BatchNormalization(synchronized=True, **arguments),
}


def build(
    model: str, normalization: str, image_shape: tuple[int, ...], classes: int, precision: str
) -> Any:
    """A new classifier of images, from Keras's current random state.

    Args:
        model: a key of `MODELS`.
        normalization: a key of `NORMALIZATIONS`.
        image_shape: (H, W, channels).
        classes: number of outputs, probabilities.
        precision: a Keras dtype policy; probabilities are in float32 at least.
    """
    inputs = keras.Input(image_shape, name="images")
    features = MODELS[model](inputs, NORMALIZATIONS[normalization], precision)
    output_dtype = "float64" if precision == "float64" else "float32"
    outputs = keras.layers.Dense(
        classes, activation="softmax", dtype=output_dtype, name="probabilities"
    )(features)
    return keras.Model(inputs, outputs, name=model)


def _mlp(inputs: Any, normalization: Callable[..., Any], dtype: str) -> Any:
    x = keras.layers.Flatten(dtype=dtype)(inputs)
    x = keras.layers.Dense(128, activation="relu", dtype=dtype)(x)
    return normalization(momentum=MOMENTUM, dtype=dtype)(x)


def _convnet(inputs: Any, normalization: Callable[..., Any], dtype: str) -> Any:
    """A residual network of ten batch normalizations: a stem and four blocks of two convolutions.

    References:
        He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, 2015.
    """

    def convolution(x: Any, filters: int, size: int, strides: int) -> Any:
        x = keras.layers.Conv2D(
            filters, size, strides, padding="same", use_bias=False, dtype=dtype
        )(x)
        return normalization(momentum=MOMENTUM, dtype=dtype)(x)

    def block(x: Any, filters: int, strides: int) -> Any:
        residual = keras.layers.Activation("relu", dtype=dtype)(convolution(x, filters, 3, strides))
        residual = convolution(residual, filters, 3, 1)
        shortcut = x if strides == 1 else convolution(x, filters, 1, strides)
        total = keras.layers.Add(dtype=dtype)([residual, shortcut])
        return keras.layers.Activation("relu", dtype=dtype)(total)

    x = keras.layers.Activation("relu", dtype=dtype)(convolution(inputs, 16, 3, 1))
    for filters, strides in ((16, 1), (16, 1), (32, 2), (32, 1)):
        x = block(x, filters, strides)
    return keras.layers.GlobalAveragePooling2D(dtype=dtype)(x)


MODELS: dict[str, Callable[[Any, Callable[..., Any], str], Any]] = {
    "convnet": _convnet,
    "mlp": _mlp,
}
