"""Passes by TensorFlow's own fused batch normalization: GPUs, eager execution, varying shapes.

A view of the input is (rows, 1, fold, channels). The fold, 1 for small inputs, is how many running
sums a channel's elements are spread over: one float32 sum of a million elements has lost four
digits, the mean of its parts has not.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

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

__all__ = ["about", "count_of", "fused", "weighted_moments"]

_AXES = (0, 1, 2)

# In standard deviations: up to here the fused kernel's mean is right to about 2e-6 of one.
_LARGE_MEAN = 4.0


def count_of(x: Any, dtype: Any) -> Any:
    """Elements a channel, as a scalar: a constant where the shape is known."""
    rows, _, fold, _ = x.shape
    if rows is not None and fold is not None:
        return tf.constant(rows * fold, dtype)
    return tf.cast(tf.reduce_prod(tf.shape(x, out_type=tf.int64)[:3]), dtype)


def _fold_of(x: Any) -> Any:
    return x.shape[2] if x.shape[2] is not None else tf.shape(x)[2]


def _folded(x: Any) -> Any:
    """The fold as a part of the channels: (rows, 1, 1, fold · channels), of the same memory."""
    return tf.reshape(x, (-1, 1, 1, _fold_of(x) * x.shape[3]))


def _unfolded(vector: Any, channels: int) -> Any:
    """A result for the folded channels, as a table (fold, channels)."""
    return tf.reshape(vector, (-1, channels))


def _sum(x: Any, dtype: Any) -> Any:
    """The sum of each channel, shape (C,), by as many running sums as the fold has."""
    sums = _unfolded(tf.reduce_sum(_folded(x), axis=_AXES), x.shape[3])
    return tf.reduce_sum(tf.cast(sums, dtype), axis=0)


def weighted_moments(x: Any, weights: Any, dtype: Any) -> Moments:
    """Moments in `dtype` of weighted elements, by sums in the dtype of x."""
    count = _sum(tf.cast(weights, dtype), dtype)
    count = count[0] if weights.shape[3] == 1 else count
    weights = tf.cast(weights, x.dtype)
    x = where_counted(weights, x)
    mean = _sum(weights * x, dtype) / as_divisor(count, xp)
    return Moments(count, *about(mean, x, weights, count))


def about(mean: Any, x: Any, weights: Any | None, count: Any) -> tuple[Any, Any]:
    """Mean and sum of squared deviations in the dtype of a mean that is nearly right."""
    rough = tf.cast(mean, x.dtype)
    deviations = x - rough
    weighted = deviations if weights is None else weights * deviations
    rest = _sum(weighted, mean.dtype) / as_divisor(count, xp)
    m2 = _sum(weighted * deviations, mean.dtype) - count * rest * rest
    return tf.cast(rough, mean.dtype) + rest, tf.maximum(m2, 0)


def _moments(x: Any, weights: Any | None, dtype: Any) -> Moments:
    """Moments in `dtype`, by float32."""
    if weights is not None:
        return weighted_moments(tf.cast(x, tf.float32), weights, dtype)
    count = count_of(x, dtype)
    mean, m2 = _moments_by_fold(x, count, dtype)

    def refined() -> tuple[Any, Any]:
        return about(mean, tf.cast(x, tf.float32), None, count)

    # The kernel's mean is a float32 sum, a few roundings off. Between replicas of different means
    # that enters the variance at first order, and where the mean is large it is no longer small.
    # And XLA computes the kernel as E[x²] − E[x]².
    large = tf.reduce_any(count * tf.square(mean) > _LARGE_MEAN**2 * m2)
    if tf.config.list_logical_devices("GPU"):
        # A branch would wait for the device; there two more passes are cheap.
        return Moments(count, *refined())
    return Moments(count, *tf.cond(large, refined, lambda: (mean, m2)))


def _moments_by_fold(x: Any, count: Any, dtype: Any) -> tuple[Any, Any]:
    """Mean and sum of squared deviations by the fused kernel, merged over the fold."""
    channels = x.shape[3]
    folded = _folded(x)
    ones = tf.ones(tf.shape(folded)[3:])
    _, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=folded,
        scale=ones,
        offset=tf.zeros_like(ones),
        mean=tf.zeros(0),
        variance=tf.zeros(0),
        is_training=True,
    )
    if not x.shape.is_fully_defined() or 0 in x.shape:
        # The kernel's statistics of an empty batch are NaN, which must not travel.
        mean, variance = (tf.where(count > 0, part, 0.0) for part in (mean, variance))
    rows = count / tf.cast(_fold_of(x), dtype)
    # The kernel's variance is the unbiased one.
    m2 = tf.cast(variance, dtype) * tf.maximum(rows - 1, 0)
    mean = tf.cast(mean, dtype)
    if x.shape[2] == 1:
        return mean, m2
    means = _unfolded(mean, channels)
    mean = tf.reduce_mean(means, axis=0)
    between = tf.reduce_sum(tf.math.squared_difference(means, mean), axis=0)
    return mean, tf.reduce_sum(_unfolded(m2, channels), axis=0) + rows * between


def _apply(x: Any, scaling: Scaling) -> Any:
    """`(x − mean) · scale + offset`, in x's dtype, by way of float32."""
    return _linear(x, scaling.mean, scaling.scale, scaling.offset)


def _linear(x: Any, mean: Any, scale: Any, offset: Any) -> Any:
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=scale,
        offset=offset,
        mean=mean,
        variance=tf.ones_like(mean),
        epsilon=0,
        is_training=False,
    ).y


def _sums(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> tuple[CotangentSums, Any]:
    """The local sums, and `dy · scale`."""
    dy, x = _counted(dy, x, weights, scaling)
    fold, channels = _fold_of(x), x.shape[3]

    def tiled(vector: Any) -> Any:
        return vector if x.shape[2] == 1 else tf.tile(vector, [fold])

    mean = tiled(scaling.mean)
    gradients = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=_folded(dy),
        x=_folded(x),
        scale=tiled(scaling.scale),
        reserve_space_1=mean,
        reserve_space_2=tf.ones_like(mean),  # a variance: the second sum is that of dy · (x − mean)
        reserve_space_3=tf.zeros(0),
        epsilon=0,
        is_training=False,
    )
    sums = (gradients.offset_backprop, gradients.scale_backprop)
    if x.shape[2] != 1:
        sums = tuple(tf.reduce_sum(_unfolded(one, channels), axis=0) for one in sums)
    return CotangentSums(*sums), tf.reshape(gradients.x_backprop, tf.shape(x))


def _gradient(
    dy: Any,
    x: Any,
    weights: Any | None,
    scaling: Scaling,
    correction: Correction,
    scaled: Any,
) -> Any:
    _, counted = _counted(dy, x, weights, scaling)
    scale, offset = -scaling.scale * correction.slope, -scaling.scale * correction.offset
    terms = _linear(counted, scaling.mean, scale, offset)
    if weights is not None:
        terms *= tf.cast(weights, terms.dtype)
    return tf.cast(scaled + terms, x.dtype)


def _counted(dy: Any, x: Any, weights: Any | None, scaling: Scaling) -> tuple[Any, Any]:
    """Both in float32, as before an activation, 0 where they do not count."""
    # In half precision the three terms of dx would each be rounded, and their small sum lost.
    dy, x = tf.cast(dy, tf.float32), tf.cast(x, tf.float32)
    dy, x = before_activation(dy, x, scaling.negative_slope)
    return where_counted(weights, dy), where_counted(weights, x)


fused = Kernel(_moments, _apply, _sums, _gradient)
