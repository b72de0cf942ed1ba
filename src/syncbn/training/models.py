"""The models of the main job, with the normalization as a parameter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from syncbn.layer import SyncBatchNormalization

__all__ = ["MODELS", "build", "draw_kernels", "normalization_of"]

# Keras's 0.99 remembers about a hundred steps, more than an epoch of the digits has.
MOMENTUM = 0.9


class _Float64BatchNormalization(keras.layers.BatchNormalization):
    """Keras's layer in float64 on every backend: its own rounds to float32 on JAX and torch.

    The formula as it stands, with the framework's gradient; it shares nothing with syncbn's layer.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any | None = None) -> Any:
        """As Keras's; the moving statistics are kept in float64 too."""
        if not training:
            return super().call(inputs, training=training, mask=mask)
        *others, _ = range(len(inputs.shape))
        count = math.prod(inputs.shape[axis] for axis in others)
        mean = ops.sum(inputs, axis=others) / count
        deviations = inputs - mean
        variance = ops.sum(deviations * deviations, axis=others) / count
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + batch * (1 - self.momentum))
        return deviations / ops.sqrt(variance + self.epsilon) * self.gamma + self.beta


def normalization_of(norm: str, replicas: int, precision: str) -> Callable[..., Any]:
    """What makes the normalization layers of a run, on Keras's backend.

    Args:
        norm: "sync", "local", or "keras" for Keras's own synchronization, which is an argument on
            TensorFlow, what XLA makes of the plain layer on JAX, and not there on torch;
            "reference" for one device.
        replicas: over which it trains.
        precision: a Keras dtype policy.
    """
    if norm == "sync":
        return SyncBatchNormalization
    backend = keras.backend.backend()
    if norm == "reference" and precision == "float64" and backend != "tensorflow":
        return _Float64BatchNormalization
    if norm == "local" and backend == "jax" and replicas > 1:
        # Under keras.distribution no layer of Keras's is local.
        return functools.partial(SyncBatchNormalization, group_size=1)
    if norm == "keras" and backend == "tensorflow":
        return functools.partial(keras.layers.BatchNormalization, synchronized=True)
    layer: Callable[..., Any] = keras.layers.BatchNormalization
    return layer


def build(
    model: str,
    normalization: Callable[..., Any],
    image_shape: tuple[int, ...],
    classes: int,
    precision: str,
) -> Any:
    """A new classifier of images.

    Args:
        model: a key of `MODELS`.
        normalization: makes the normalization layers, of Keras's arguments.
        image_shape: (H, W, channels).
        classes: number of outputs, probabilities.
        precision: a Keras dtype policy; probabilities are in float32 at least.
    """
    inputs = keras.Input(image_shape, name="images")
    features = MODELS[model](inputs, normalization, precision)
    output_dtype = "float64" if precision == "float64" else "float32"
    outputs = keras.layers.Dense(
        classes, activation="softmax", dtype=output_dtype, name="probabilities"
    )(features)
    return keras.Model(inputs, outputs, name=model)


def draw_kernels(model: Any, seed: int) -> None:
    """Draw the kernels anew by Keras's default, uniform by Glorot, but the same on any backend.

    From one seed Keras draws other numbers on each: its generators are the frameworks'.
    """
    # Not the generator that orders the examples by the same seed.
    rng = np.random.default_rng([seed, 1])
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            *field, inputs, outputs = layer.kernel.shape
            limit = math.sqrt(6 / (math.prod(field) * (inputs + outputs)))
            layer.kernel.assign(rng.uniform(-limit, limit, layer.kernel.shape))


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
    # Not GlobalAveragePooling2D, which rounds float64 to float32 on JAX and torch.
    x = keras.layers.AveragePooling2D(tuple(x.shape[1:3]), dtype=dtype)(x)
    return keras.layers.Flatten(dtype=dtype)(x)


MODELS: dict[str, Callable[[Any, Callable[..., Any], str], Any]] = {
    "convnet": _convnet,
    "mlp": _mlp,
}
