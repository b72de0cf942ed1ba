"""Passes by TensorFlow's elementary operations: float64, small inputs, gradients of gradients."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from syncbn._backends.tensorflow.fused import about, count_of, weighted_moments
from syncbn._backends.tensorflow.inversion import before_activation
from syncbn._backends.tensorflow.namespace import xp
from syncbn._backends.tensorflow.scaling import (
    Correction,
    CotangentSums,
    Kernel,
    Scaling,
    where_counted,
)
from syncbn.moments import Moments, as_divisor

__all__ = ["composed"]

_AXES = (0, 1, 2)


def _moments(x: Any, weights: Any | None, dtype: Any) -> Moments:
    """Moments in two passes: first the mean, then the deviations from it."""
    wide = tf.cast(x, dtype)
    if weights is not None:
        return weighted_moments(wide, weights, dtype)
    count = count_of(x, dtype)
    mean = tf.reduce_sum(wide, axis=_AXES) / as_divisor(count, xp)
    if dtype == tf.float32:
        return Moments(count, *about(mean, wide, None, count))
    return Moments(count, mean, tf.reduce_sum(tf.math.squared_difference(wide, mean), axis=_AXES))


def _apply(x: Any, scaling: Scaling) -> Any:
    wide = tf.cast(x, scaling.scale.dtype)
    return tf.cast((wide - scaling.mean) * scaling.scale + scaling.offset, x.dtype)


def _sums(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> tuple[CotangentSums, None]:
    dy, x = _counted(dy, x, weights, scaling)
    deviations = tf.reduce_sum(dy * (x - scaling.mean), axis=_AXES)
    return CotangentSums(tf.reduce_sum(dy, axis=_AXES), deviations), None


def _gradient(
    dy: Any,
    x: Any,
    weights: Any | None,
    scaling: Scaling,
    correction: Correction,
    _: Any | None,
) -> Any:
    wide_dy, wide_x = _counted(dy, x, weights, scaling)
    corrections = (wide_x - scaling.mean) * correction.slope + correction.offset
    if weights is not None:
        corrections *= tf.cast(weights, corrections.dtype)
    return tf.cast((wide_dy - corrections) * scaling.scale, x.dtype)


def _counted(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> tuple[Any, Any]:
    """Both in the dtype of scaling, as before an activation, 0 where they do not count."""
    dy, x = tf.cast(dy, scaling.gamma.dtype), tf.cast(x, scaling.gamma.dtype)
    dy, x = before_activation(dy, x, scaling.negative_slope)
    return where_counted(weights, dy), where_counted(weights, x)


composed = Kernel(_moments, _apply, _sums, _gradient)
