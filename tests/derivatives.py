"""Derivatives: by differences, and of a layer's input gradient for gradients of gradients."""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def central_differences(function, array, step=1e-5):
    gradient = np.zeros_like(array)
    for index in np.ndindex(*array.shape):
        values = []
        for sign in (1, -1):
            moved = array.copy()
            moved[index] += sign * step
            values.append(function(moved))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient


def input_gradient_along(layer, x, dy, direction, **call_arguments):
    """`<direction, dx>`, to be derived once more under a tape of the caller's."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True, **call_arguments)
    return tf.reduce_sum(direction * tape.gradient(y, x, output_gradients=dy))
