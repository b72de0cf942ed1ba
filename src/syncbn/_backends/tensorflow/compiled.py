"""Passes over a view that XLA compiles, each reading its tensors once: large tensors on a CPU.

TensorFlow's own reductions read a tensor once for each sum, and its fused kernels write outputs
that nobody asked for. Here two sums are one complex sum, by rows that lie side by side: so a pass
runs at nearly the speed of memory. `benchmarks/kernels.py` measures each.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from syncbn._backends.tensorflow import xla
from syncbn._backends.tensorflow.fused import fused
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

__all__ = ["compiled"]

# Strips of rows that are added up side by side: the compiler makes straight-line code of them, in
# vectors; of 32 a loop over strides, with which all passes take one and a half times as long.
_STRIPS = 12

# Rows whose mean is near enough to that of all rows to take deviations from: of m of n elements it
# is at most √(n / m) standard deviations off, whatever they are.
_SAMPLES = 64


def _moments(x: Any, weights: Any | None, dtype: Any) -> Moments:
    """Moments in `dtype`, by float32 for each strip."""
    rows = _rows(x)
    if weights is None:
        pivot, count, *strips = xla.run(_deviations_from_sample, rows, dtype=dtype)
        mean, m2 = xla.run(_about_pivot, pivot, count, *_folded(*strips), dtype=dtype)
    else:
        # In two passes: where few elements count there may be none of them in a sample.
        counted = _rows(weights)
        strips = xla.run(_weighted, rows, counted)
        pivot, count = xla.run(_weighted_mean, *_folded(*strips), dtype=dtype)
        strips = xla.run(_weighted_deviations, rows, counted, pivot)
        mean, m2 = xla.run(_about_pivot, pivot, count, *_folded(*strips), dtype=dtype)
        count = count[0] if weights.shape[3] == 1 else tf.ensure_shape(count, x.shape[3:])
    return Moments(count, tf.ensure_shape(mean, x.shape[3:]), tf.ensure_shape(m2, x.shape[3:]))


def _deviations_from_sample(x: Any, dtype: Any) -> tuple[Any, ...]:
    x = tf.cast(x, tf.float32)
    # An odd step: of images an even one may meet nothing but borders.
    step = tf.bitwise.bitwise_or(tf.maximum(tf.shape(x)[0] // _SAMPLES, 1), 1)
    # Of a rank that the slice does not know.
    sample = tf.ensure_shape(x[::step], [None, x.shape[1]])
    size = tf.cast(tf.maximum(tf.shape(sample)[0], 1), tf.float32)
    mean = tf.reduce_sum(sample, axis=0) / size
    variance = tf.reduce_sum(tf.math.squared_difference(sample, mean), axis=0) / size
    pivot = _with_few_digits(mean, tf.sqrt(variance))
    deviations = x - pivot
    count = tf.cast(tf.shape(x)[0], dtype)
    return pivot, count, *_strips(deviations, deviations * deviations)


def _with_few_digits(mean: Any, deviation: Any) -> Any:
    """The mean to a sixteenth of a standard deviation, so that `x − mean` is rounded seldom.

    With all its digits the rounding of all x of one size would go the same way, and add up.
    """
    exponent = tf.bitwise.bitwise_and(tf.bitcast(deviation, tf.int32), 0x7F800000)
    unit = tf.bitcast(exponent, tf.float32) / 16
    rounded = tf.round(mean / unit) * unit
    return tf.where((unit > 0) & tf.math.is_finite(rounded), rounded, mean)


def _weighted(x: Any, weights: Any) -> tuple[Any, Any]:
    weights = tf.cast(weights, tf.float32)
    x = where_counted(weights, tf.cast(x, tf.float32))
    return _strips(tf.broadcast_to(weights, tf.shape(x)), weights * x)


def _weighted_mean(strips: Any, rest: Any, dtype: Any) -> tuple[Any, Any]:
    count, total = _total(strips, rest, dtype)
    return tf.cast(total / as_divisor(count, xp), tf.float32), count


def _weighted_deviations(x: Any, weights: Any, pivot: Any) -> tuple[Any, Any]:
    weights = tf.cast(weights, tf.float32)
    deviations = where_counted(weights, tf.cast(x, tf.float32) - pivot)
    weighted = weights * deviations
    return _strips(weighted, weighted * deviations)


def _about_pivot(pivot: Any, count: Any, strips: Any, rest: Any, dtype: Any) -> tuple[Any, Any]:
    """Mean and sum of squared deviations, from sums about something near the mean."""
    total, squares = _total(strips, rest, dtype)
    shift = total / as_divisor(count, xp)
    return tf.cast(pivot, dtype) + shift, tf.maximum(squares - total * shift, 0)


def _cotangent_sums(
    dy: Any, x: Any, weights: Any | None, scaling: Scaling
) -> tuple[CotangentSums, None]:
    counted = () if weights is None else (_rows(weights),)
    negative_slope = scaling.negative_slope
    strips = xla.run(
        _products, _rows(dy), _rows(x), scaling.mean, *counted, negative_slope=negative_slope
    )
    return CotangentSums(*xla.run(_total_products, *_folded(*strips))), None


def _products(
    dy: Any, x: Any, mean: Any, weights: Any | None = None, *, negative_slope: float
) -> tuple[Any, Any]:
    """Strips of `Σ dy` and `Σ dy · (x − mean)`."""
    dy, x = _counted(dy, x, weights, negative_slope)
    return _strips(dy, dy * (x - mean))


def _total_products(strips: Any, rest: Any) -> tuple[Any, Any]:
    outputs, deviations = _total(strips, rest, tf.float64)
    return tf.cast(outputs, tf.float32), tf.cast(deviations, tf.float32)


def _gradient(
    dy: Any,
    x: Any,
    weights: Any | None,
    scaling: Scaling,
    correction: Correction,
    _: Any | None,
) -> Any:
    vectors = (scaling.mean, scaling.scale, correction.slope, correction.offset)
    counted = () if weights is None else (_rows(weights),)
    negative_slope = scaling.negative_slope
    dx = xla.run(
        _three_terms, _rows(dy), _rows(x), *vectors, *counted, negative_slope=negative_slope
    )
    return tf.reshape(dx, tf.shape(x))


def _three_terms(
    dy: Any,
    x: Any,
    mean: Any,
    scale: Any,
    slope: Any,
    offset: Any,
    weights: Any | None = None,
    *,
    negative_slope: float,
) -> Any:
    """`scale · (dy − (x − mean) · slope − offset)`; of what does not count, 0."""
    counted_dy, counted = _counted(dy, x, weights, negative_slope)
    correction = (counted - mean) * slope + offset
    if weights is not None:
        correction *= tf.cast(weights, tf.float32)
    return tf.cast((counted_dy - correction) * scale, x.dtype)


def _counted(dy: Any, x: Any, weights: Any | None, negative_slope: float) -> tuple[Any, Any]:
    """Both in float32, as before an activation, 0 where they do not count."""
    dy, x = tf.cast(dy, tf.float32), tf.cast(x, tf.float32)
    dy, x = before_activation(dy, x, negative_slope)
    return where_counted(weights, dy), where_counted(weights, x)


def _strips(one: Any, other: Any) -> tuple[Any, Any]:
    """Sums over the rows of two float32 tensors, of each strip, by one pass over what makes them.

    As complex numbers: XLA fuses what makes both parts into one loop, but two sums into two.

    Returns:
        Strips, shape (rows / strips, channels), and what is left over, shape (channels,).
    """
    return _strips_of(tf.complex(one, other))


def _strips_of(pairs: Any) -> tuple[Any, Any]:
    rows = tf.shape(pairs)[0]
    # An odd length: strips at a distance of a multiple of 4096 bytes share one set of the cache.
    length = tf.maximum((rows // _STRIPS - 1) // 2 * 2 + 1, 0)
    strips = tf.reshape(pairs[: length * _STRIPS], [_STRIPS, length, tf.shape(pairs)[1]])
    return tf.reduce_sum(strips, axis=0), tf.reduce_sum(pairs[length * _STRIPS :], axis=0)


def _total(strips: Any, rest: Any, dtype: Any) -> tuple[Any, Any]:
    """Both sums, in `dtype`."""
    wide = tf.complex128 if dtype == tf.float64 else tf.complex64
    sums = tf.reduce_sum(tf.cast(strips, wide), axis=0) + tf.cast(rest, wide)
    return tf.math.real(sums), tf.math.imag(sums)


def _folded(strips: Any, rest: Any) -> tuple[Any, Any]:
    """The strips by strips once more.

    Compiled apart from what makes them: together it would become one loop that makes each anew.
    """
    fewer, ends = xla.run(_strips_of, strips)
    return fewer, ends + rest


def _rows(view: Any) -> Any:
    return tf.reshape(view, (-1, view.shape[3]))


# The fused kernel's normalization reads once and writes once too, and starts sooner.
compiled = Kernel(_moments, fused.apply, _cotangent_sums, _gradient)
