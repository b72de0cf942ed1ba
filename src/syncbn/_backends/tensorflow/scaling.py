"""What normalizes and what its gradient sums: vectors of the size of the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._backends.tensorflow.namespace import xp
from syncbn.moments import Moments, as_divisor

__all__ = ["Correction", "CotangentSums", "Kernel", "Scaling", "statistics_dtype", "where_counted"]


class Scaling(NamedTuple):
    """The C-sized vectors that normalize: `y = (x − mean) · scale + offset`.

    The mean is in two parts. At large means the distance between two float32 numbers is a visible
    part of a standard deviation: `x − mean` is exact, and what the mean lacks goes into the offset.
    """

    mean: Any  # shape (C,)
    mean_rest: Any  # shape (C,): the mean less `mean`, smaller than its rounding
    inverse: Any  # shape (C,): 1 / √(variance + epsilon)
    gamma: Any  # shape (C,)
    scale: Any  # shape (C,): gamma · inverse
    offset: Any  # shape (C,): beta, less what the mean lacks, scaled
    # Of the activation below 0, where the backward gets its result in place of x; 1 for none.
    negative_slope: float = 1.0

    @classmethod
    def of(cls, moments: Moments, gamma: Any, beta: Any, epsilon: float) -> Scaling:
        """In the dtype of gamma, whatever that of the moments."""
        mean = tf.cast(moments.mean, gamma.dtype)
        rest = moments.mean - tf.cast(mean, moments.mean.dtype)
        rest = tf.cast(rest, gamma.dtype)
        inverse = tf.math.rsqrt(tf.cast(moments.variance(xp), gamma.dtype) + epsilon)
        scale = gamma * inverse
        return cls(mean, rest, inverse, gamma, scale, beta - rest * scale)


class CotangentSums(NamedTuple):
    """What the gradient needs to know of a replica's part, a channel each."""

    outputs: Any  # shape (C,): Σ dy; also the gradient of beta
    deviations: Any  # shape (C,): Σ dy · (x − mean), with the mean without its rest

    def normalized(self, scaling: Scaling) -> tuple[Any, Any]:
        """`Σ dy` and `Σ dy·x̂`, the gradients of beta and gamma, packed for the collective too.

        Returns:
            Shape (2C,), and shape (C,) of its second half.
        """
        normalized = (self.deviations - scaling.mean_rest * self.outputs) * scaling.inverse
        return tf.concat([self.outputs, normalized], axis=0), normalized


class Correction(NamedTuple):
    """What is taken from dy: `dx = scale · (dy − w · ((x − mean) · slope + offset))`."""

    slope: Any  # shape (C,): Σ dy·x̂ / n, times inverse
    offset: Any  # shape (C,): Σ dy / n, less what the mean lacks

    @classmethod
    def of(cls, total: Any, count: Any, scaling: Scaling) -> Correction:
        """From the packed sums, shape (2C,), and the count of the whole batch."""
        divisor = tf.cast(as_divisor(count, xp), total.dtype)
        outputs, normalized = (sums / divisor for sums in tf.split(total, 2))
        slope = normalized * scaling.inverse
        return cls(slope, outputs - slope * scaling.mean_rest)


class Kernel(NamedTuple):
    """The four passes over one replica's part, a view of shape (rows, 1, fold, channels).

    Weights, where there are any, are a view with one channel, or with all of them. An element of
    weight 0 does not exist: `where` leaves it out, since 0 · NaN is NaN.
    """

    # (x, weights, dtype) -> moments in that dtype
    moments: Callable[[Any, Any | None, Any], Moments]
    # (x, scaling) -> y, in the dtype of x
    apply: Callable[[Any, Scaling], Any]
    # (dy, x, weights, scaling) -> the sums, in the dtype of scaling, and what `gradient` can use
    sums: Callable[[Any, Any, Any | None, Scaling], tuple[CotangentSums, Any | None]]
    # (dy, x, weights, scaling, correction, what `sums` left) -> dx, in the dtype of x
    gradient: Callable[[Any, Any, Any | None, Scaling, Correction, Any | None], Any]


def statistics_dtype(dtype: Any) -> Any:
    """The dtype that inputs of this one are computed in."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def where_counted(weights: Any | None, x: Any) -> Any:
    """The view with 0 in place of what has no weight."""
    return x if weights is None else tf.where(weights > 0, x, tf.zeros((), x.dtype))
