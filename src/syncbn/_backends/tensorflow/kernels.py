"""Passes over a rank-4 channels-last view of the input: moments, normalization, gradient.

Two kernels with the same three functions: `fused`, from TensorFlow's own fused batch normalization,
and `composed`, which also serves float64 and can be differentiated any number of times. None of
them looks beyond its replica.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._backends.tensorflow.namespace import xp
from syncbn.moments import Moments, as_divisor

__all__ = ["CotangentSums", "Scaling", "composed", "kernel_for"]

_AXES = (0, 1, 2)

# Of the pass that only measures: keeps its discarded output finite for a constant channel.
_MOMENTS_EPSILON = 1e-4

# In standard deviations: up to here the fused kernel's mean is right to 2e-6 of one.
_LARGE_MEAN = 4.0


class Scaling(NamedTuple):
    """The C-sized vectors that normalize: `y = (x − mean) · gamma / √(variance + epsilon) + beta`.

    The mean is in two parts. At large means the distance between two float32 numbers is a visible
    part of a standard deviation: `x − mean` is exact, and what the mean lacks goes into the offset.
    """

    mean: Any  # shape (C,)
    mean_rest: Any  # shape (C,): the mean less `mean`, smaller than its rounding
    variance: Any  # shape (C,), biased
    gamma: Any  # shape (C,)
    beta: Any  # shape (C,)
    epsilon: float

    @classmethod
    def of(cls, moments: Moments, gamma: Any, beta: Any, epsilon: float) -> Scaling:
        """In the dtype of gamma, whatever that of the moments."""
        mean = tf.cast(moments.mean, gamma.dtype)
        rest = moments.mean - tf.cast(mean, moments.mean.dtype)
        variance = tf.cast(moments.variance(xp), gamma.dtype)
        return cls(mean, tf.cast(rest, gamma.dtype), variance, gamma, beta, epsilon)

    def inverse_deviation(self) -> Any:
        """`1 / √(variance + epsilon)`, shape (C,)."""
        return tf.math.rsqrt(self.variance + self.epsilon)

    def offset(self) -> Any:
        """What is added to `(x − mean) · gamma / √(…)`: beta, less what the mean lacks."""
        return self.beta - self.mean_rest * self.gamma * self.inverse_deviation()


class CotangentSums(NamedTuple):
    """What the gradient needs to know of a whole batch, a channel each."""

    outputs: Any  # shape (C,): Σ dy; also the gradient of beta
    normalized: Any  # shape (C,): Σ dy·x̂; also the gradient of gamma


def kernel_for(dtype: Any) -> SimpleNamespace:
    """The kernel for inputs of this dtype: TensorFlow has fused ones for all but float64."""
    return composed if dtype == tf.float64 else fused


def _count(x: Any, dtype: Any) -> Any:
    """Elements a channel, as a scalar: a constant where the shape is known."""
    height, width, depth = (x.shape[axis] for axis in _AXES)
    if None not in (height, width, depth):
        return tf.constant(height * width * depth, dtype)
    return tf.cast(tf.reduce_prod(tf.shape(x, out_type=tf.int64)[:3]), dtype)


def _fused_moments(x: Any, dtype: Any) -> Moments:
    """Moments in `dtype`, by float32."""
    channels = x.shape[3]
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.ones(channels),
        offset=tf.zeros(channels),
        mean=tf.zeros(0),
        variance=tf.zeros(0),
        epsilon=_MOMENTS_EPSILON,
        is_training=True,
    )
    count = _count(x, dtype)
    if not x.shape.is_fully_defined() or 0 in x.shape:
        # The kernel's statistics of an empty batch are NaN, which must not travel.
        mean, variance = (tf.where(count > 0, part, 0.0) for part in (mean, variance))
    # The kernel's variance is the unbiased one.
    m2 = tf.cast(variance, dtype) * tf.maximum(count - 1, 0)
    if x.dtype != tf.float32:
        return Moments(count, tf.cast(mean, dtype), m2)

    def refined() -> tuple[Any, Any]:
        # y is there anyway, centred and of the size of 1: its own mean is what the mean lacks.
        deviation = tf.sqrt(tf.cast(m2 / as_divisor(count, xp), tf.float32) + _MOMENTS_EPSILON)
        rest = tf.reduce_sum(y, axis=_AXES) * deviation
        rest = tf.cast(rest, dtype) / as_divisor(count, xp)
        return tf.cast(mean, dtype) + rest, tf.maximum(m2 - count * rest * rest, 0)

    # The kernel's mean is a float32 sum, a few roundings off. Between replicas of different means
    # that enters the variance at first order, and where the mean is large it is no longer small.
    large = tf.reduce_any(tf.square(mean) > _LARGE_MEAN**2 * variance)
    if tf.config.list_logical_devices("GPU"):
        # A branch would wait for the device; there the pass over y is cheap.
        mean, m2 = refined()
    else:
        mean, m2 = tf.cond(large, refined, lambda: (tf.cast(mean, dtype), m2))
    return Moments(count, mean, m2)


def _fused_apply(x: Any, scaling: Scaling) -> Any:
    """`(x − mean) · gamma / √(variance + epsilon) + beta`, in x's dtype, by way of float32."""
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=scaling.gamma,
        offset=scaling.offset(),
        mean=scaling.mean,
        variance=scaling.variance,
        epsilon=scaling.epsilon,
        is_training=False,
    ).y


def _fused_backward(dy: Any, x: Any, scaling: Scaling) -> tuple[Any, CotangentSums]:
    """`dy · gamma / √(variance + epsilon)` and the local sums."""
    gradients = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=dy,
        x=x,
        scale=scaling.gamma,
        reserve_space_1=scaling.mean,
        reserve_space_2=scaling.variance,
        reserve_space_3=tf.zeros(0),
        epsilon=scaling.epsilon,
        is_training=False,
    )
    return gradients.x_backprop, _about_the_mean(
        gradients.offset_backprop, gradients.scale_backprop, scaling
    )


def _about_the_mean(outputs: Any, normalized: Any, scaling: Scaling) -> CotangentSums:
    """The sums, of which the second was taken about `mean` without its rest."""
    rest = scaling.mean_rest * scaling.inverse_deviation()
    return CotangentSums(outputs, normalized - rest * outputs)


def _composed_moments(x: Any, dtype: Any) -> Moments:
    """Moments in two passes: first the mean, then the deviations from it."""
    x = tf.cast(x, dtype)
    count = _count(x, dtype)
    mean = tf.reduce_sum(x, axis=_AXES) / as_divisor(count, xp)
    return Moments(count, mean, tf.reduce_sum(tf.math.squared_difference(x, mean), axis=_AXES))


def _composed_apply(x: Any, scaling: Scaling) -> Any:
    scale = scaling.gamma * scaling.inverse_deviation()
    return (x - scaling.mean) * scale + scaling.offset()


def _composed_backward(dy: Any, x: Any, scaling: Scaling) -> tuple[Any, CotangentSums]:
    inverse = scaling.inverse_deviation()
    outputs = tf.reduce_sum(dy, axis=_AXES)
    normalized = tf.reduce_sum(dy * (x - scaling.mean), axis=_AXES) * inverse
    return dy * (scaling.gamma * inverse), _about_the_mean(outputs, normalized, scaling)


fused = SimpleNamespace(moments=_fused_moments, apply=_fused_apply, backward=_fused_backward)
composed = SimpleNamespace(
    moments=_composed_moments, apply=_composed_apply, backward=_composed_backward
)
