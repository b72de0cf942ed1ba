"""Derivatives of a layer's input gradient for gradients of gradients."""

from __future__ import annotations

import tensorflow as tf


def input_gradient_along(layer, x, dy, direction, **call_arguments):
    """`<direction, dx>`, to be derived once more under a tape of the caller's."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True, **call_arguments)
    return tf.reduce_sum(direction * tape.gradient(y, x, output_gradients=dy))
