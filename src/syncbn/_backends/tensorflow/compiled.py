"""Passes over a view that XLA compiles, each reading its tensors once: large tensors on a CPU.

TensorFlow's own reductions read a tensor once for each sum, and its fused kernels write outputs
that nobody asked for. Here two sums are one complex sum, by rows that lie side by side: so a pass
runs at nearly the speed of memory. `benchmarks/kernels.py` measures each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from syncbn._backends.tensorflow.namespace import xp
from syncbn._backends.tensorflow.scaling import CotangentSums, Kernel, Scaling, where_counted
from syncbn.moments import Moments, as_divisor

__all__ = ["compiled"]

# Strips of rows that are added up side by side. Of so many XLA's compiler makes straight-line code
# in vectors; of 32 a loop over strides, five times as slow.
_STRIPS = 16

# Rows whose mean is near enough to that of all rows to take deviations from: of m of n elements it
# is at most √(n / m) standard deviations off, whatever they are.
_SAMPLES = 64


def _moments(x: Any, weights: Any | None, dtype: Any) -> Moments:
    """Moments in `dtype`, by float32 for each strip."""
    if weights is None:
        count, mean, m2 = _run(_plain_moments, _rows(x), dtype=dtype)
    else:
        count, mean, m2 = _run(_weighted_moments, _rows(x), _rows(weights), dtype=dtype)
        count = count[0] if weights.shape[3] == 1 else tf.ensure_shape(count, x.shape[3:])
    return Moments(count, tf.ensure_shape(mean, x.shape[3:]), tf.ensure_shape(m2, x.shape[3:]))


def _plain_moments(x: Any, dtype: Any) -> tuple[Any, Any, Any]:
    x = tf.cast(x, tf.float32)
    sample = x[:: tf.maximum(tf.shape(x)[0] // _SAMPLES, 1)]
    pivot = tf.reduce_sum(sample, axis=0) / _at_least_one(tf.shape(sample)[0], tf.float32)
    deviations = x - pivot
    total, squares = _sums(deviations, deviations * deviations, dtype)
    rows = tf.cast(tf.shape(x)[0], dtype)
    rest = total / _at_least_one(rows, dtype)
    m2 = tf.maximum(squares - total * rest, 0)
    return rows, tf.cast(pivot, dtype) + rest, m2


def _weighted_moments(x: Any, weights: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """In two passes: where few elements count there may be none of them in a sample."""
    weights = tf.cast(weights, tf.float32)
    x = where_counted(weights, tf.cast(x, tf.float32))
    count, total = _sums(tf.broadcast_to(weights, tf.shape(x)), weights * x, dtype)
    divisor = as_divisor(count, xp)
    rough = tf.cast(total / divisor, tf.float32)
    deviations = x - rough
    weighted = weights * deviations
    total, squares = _sums(weighted, weighted * deviations, dtype)
    rest = total / divisor
    m2 = tf.maximum(squares - total * rest, 0)
    return count, tf.cast(rough, dtype) + rest, m2


def _apply(x: Any, scaling: Scaling) -> Any:
    """`(x − mean) · gamma / √(variance + epsilon) + beta`, in x's dtype, by way of float32."""
    scale = scaling.gamma * scaling.inverse_deviation()
    y = _run(_scaled, _rows(x), scaling.mean, scale, scaling.offset())
    return tf.reshape(y, tf.shape(x))


def _scaled(x: Any, mean: Any, scale: Any, offset: Any) -> Any:
    return tf.cast((tf.cast(x, tf.float32) - mean) * scale + offset, x.dtype)


def _cotangent_sums(
    dy: Any, x: Any, weights: Any | None, scaling: Scaling
) -> tuple[CotangentSums, None]:
    counted = () if weights is None else (_rows(weights),)
    outputs, about_mean = _run(_products, _rows(dy), _rows(x), scaling.mean, *counted)
    sums = CotangentSums(
        tf.ensure_shape(outputs, x.shape[3:]),
        tf.ensure_shape(about_mean, x.shape[3:]) * scaling.inverse_deviation(),
    )
    return sums.about_the_mean(scaling), None


def _products(dy: Any, x: Any, mean: Any, weights: Any | None = None) -> tuple[Any, Any]:
    """`Σ dy` and `Σ dy · (x − mean)`."""
    dy = where_counted(weights, tf.cast(dy, tf.float32))
    x = where_counted(weights, tf.cast(x, tf.float32))
    outputs, about_mean = _sums(dy, dy * (x - mean), tf.float64)
    return tf.cast(outputs, tf.float32), tf.cast(about_mean, tf.float32)


def _gradient(
    dy: Any,
    x: Any,
    weights: Any | None,
    scaling: Scaling,
    means: CotangentSums,
    _: Any | None,
) -> Any:
    inverse = scaling.inverse_deviation()
    scale = scaling.gamma * inverse
    slope = -scale * inverse * means.normalized
    offset = -scale * means.outputs - slope * scaling.mean_rest
    counted = () if weights is None else (_rows(weights),)
    dx = _run(_three_terms, _rows(dy), _rows(x), scaling.mean, scale, slope, offset, *counted)
    return tf.reshape(dx, tf.shape(x))


def _three_terms(
    dy: Any, x: Any, mean: Any, scale: Any, slope: Any, offset: Any, weights: Any | None = None
) -> Any:
    """`scale · dy + slope · (x − mean) + offset`; of what does not count, 0."""
    terms = where_counted(weights, tf.cast(dy, tf.float32)) * scale
    counted = where_counted(weights, tf.cast(x, tf.float32))
    correction = (counted - mean) * slope + offset
    if weights is not None:
        correction *= tf.cast(weights, tf.float32)
    return tf.cast(terms + correction, x.dtype)


def _sums(one: Any, other: Any, dtype: Any) -> tuple[Any, Any]:
    """The sums over the rows of two float32 tensors, in `dtype`, by one pass over what they are of.

    As one complex sum: XLA fuses what makes both numbers into one loop, but two sums into two.
    """
    pairs = tf.complex(one, other)
    length = tf.shape(pairs)[0] // _STRIPS
    strips, rest = pairs[: length * _STRIPS], pairs[length * _STRIPS :]
    strips = tf.reshape(strips, tf.concat([[_STRIPS, length], tf.shape(pairs)[1:]], axis=0))
    wide = tf.complex128 if dtype == tf.float64 else tf.complex64
    sums = tf.reduce_sum(tf.cast(tf.reduce_sum(strips, axis=0), wide), axis=0)
    sums += tf.reduce_sum(tf.cast(rest, wide), axis=0)
    return tf.math.real(sums), tf.math.imag(sums)


def _at_least_one(number: Any, dtype: Any) -> Any:
    return tf.cast(tf.maximum(number, tf.ones_like(number)), dtype)


def _rows(view: Any) -> Any:
    return tf.reshape(view, (-1, view.shape[3]))


def _run(function: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
    signature = tuple(
        tf.TensorSpec([None] * argument.shape.rank, argument.dtype) for argument in arguments
    )
    return _traced(function, signature, tuple(static.items()))(*arguments)


@functools.cache
def _traced(
    function: Callable[..., Any], signature: tuple[Any, ...], static: tuple[tuple[str, Any], ...]
) -> Any:
    """One for all shapes: XLA compiles it for each that it meets, Python traces it once."""
    return tf.function(
        functools.partial(function, **dict(static)),
        input_signature=signature,
        autograph=False,
        jit_compile=True,
    )


compiled = Kernel(_moments, _apply, _cotangent_sums, _gradient)
