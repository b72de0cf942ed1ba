"""Passes over a view of the input, (rows, 1, fold, channels): moments, normalization, gradient.

The fold, 1 for small inputs, is how many running sums a channel's elements are spread over: one
float32 sum of a million elements has lost four digits, the mean of its parts has not.

Two kernels with the same three functions: `fused`, from TensorFlow's own fused batch normalization,
and `composed`, which also serves float64 and can be differentiated any number of times. None of
them looks beyond its replica.

Weights, where there are any, are a view with one channel, or with all of them. An element of weight
0 does not exist: `where` leaves it out, since 0 · NaN is NaN.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._backends.tensorflow.namespace import xp
from syncbn.moments import Moments, as_divisor

__all__ = [
    "CotangentSums",
    "Scaling",
    "composed",
    "kernel_for",
    "statistics_dtype",
    "where_counted",
]

_AXES = (0, 1, 2)

# In standard deviations: up to here the fused kernel's mean is right to about 2e-6 of one.
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


def statistics_dtype(dtype: Any) -> Any:
    """The dtype that inputs of this one are computed in."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def kernel_for(dtype: Any) -> SimpleNamespace:
    """The kernel for inputs of this dtype: TensorFlow has fused ones for all but float64."""
    return composed if dtype == tf.float64 else fused


def _count(x: Any, dtype: Any) -> Any:
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


def where_counted(weights: Any | None, x: Any) -> Any:
    """The view with 0 in place of what has no weight."""
    return x if weights is None else tf.where(weights > 0, x, tf.zeros((), x.dtype))


def _weighted_moments(x: Any, weights: Any, dtype: Any) -> Moments:
    """Moments in `dtype` of weighted elements, by sums in the dtype of x."""
    count = _sum(tf.cast(weights, dtype), dtype)
    count = count[0] if weights.shape[3] == 1 else count
    weights = tf.cast(weights, x.dtype)
    x = where_counted(weights, x)
    mean = _sum(weights * x, dtype) / as_divisor(count, xp)
    return Moments(count, *_about(mean, x, weights, count))


def _about(mean: Any, x: Any, weights: Any | None, count: Any) -> tuple[Any, Any]:
    """Mean and sum of squared deviations in the dtype of a mean that is nearly right."""
    rough = tf.cast(mean, x.dtype)
    deviations = x - rough
    weighted = deviations if weights is None else weights * deviations
    rest = _sum(weighted, mean.dtype) / as_divisor(count, xp)
    m2 = _sum(weighted * deviations, mean.dtype) - count * rest * rest
    return tf.cast(rough, mean.dtype) + rest, tf.maximum(m2, 0)


def _fused_moments(x: Any, weights: Any | None, dtype: Any) -> Moments:
    """Moments in `dtype`, by float32."""
    if weights is not None:
        return _weighted_moments(tf.cast(x, tf.float32), weights, dtype)
    count = _count(x, dtype)
    mean, m2 = _moments_by_fold(x, count, dtype)

    def refined() -> tuple[Any, Any]:
        return _about(mean, tf.cast(x, tf.float32), None, count)

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
    fold, channels = _fold_of(x), x.shape[3]

    def tiled(vector: Any) -> Any:
        return vector if x.shape[2] == 1 else tf.tile(vector, [fold])

    gradients = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=_folded(dy),
        x=_folded(x),
        scale=tiled(scaling.gamma),
        reserve_space_1=tiled(scaling.mean),
        reserve_space_2=tiled(scaling.variance),
        reserve_space_3=tf.zeros(0),
        epsilon=scaling.epsilon,
        is_training=False,
    )
    outputs, normalized = (
        tf.reduce_sum(_unfolded(sums, channels), axis=0)
        for sums in (gradients.offset_backprop, gradients.scale_backprop)
    )
    scaled = tf.reshape(gradients.x_backprop, tf.shape(x))
    return scaled, _about_the_mean(outputs, normalized, scaling)


def _about_the_mean(outputs: Any, normalized: Any, scaling: Scaling) -> CotangentSums:
    """The sums, of which the second was taken about `mean` without its rest."""
    rest = scaling.mean_rest * scaling.inverse_deviation()
    return CotangentSums(outputs, normalized - rest * outputs)


def _composed_moments(x: Any, weights: Any | None, dtype: Any) -> Moments:
    """Moments in two passes: first the mean, then the deviations from it."""
    x = tf.cast(x, dtype)
    if weights is not None:
        return _weighted_moments(x, weights, dtype)
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
