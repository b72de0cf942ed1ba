"""TensorFlow under the names that syncbn's pure maths calls, and nothing between the two.

Not `keras.ops`: it adds its own casts to every call, and legacy Keras could not share it.
"""

from __future__ import annotations

from types import SimpleNamespace

import tensorflow as tf

__all__ = ["xp"]

xp = SimpleNamespace(
    concatenate=lambda tensors: tf.concat(tensors, axis=0),
    maximum=tf.maximum,
    minimum=tf.minimum,
    sqrt=tf.sqrt,
    sum=tf.reduce_sum,
    where=tf.where,
    zeros_like=tf.zeros_like,
)
