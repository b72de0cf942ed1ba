"""What normalizes and what its gradient sums: vectors of the size of the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._backends.tensorflow.namespace import xp
from syncbn.moments import Moments

__all__ = ["CotangentSums", "Kernel", "Scaling", "statistics_dtype", "where_counted"]


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

    def about_the_mean(self, scaling: Scaling) -> CotangentSums:
        """The sums, of which the second was taken about `scaling.mean` without its rest."""
        rest = scaling.mean_rest * scaling.inverse_deviation()
        return CotangentSums(self.outputs, self.normalized - rest * self.outputs)


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
    # (dy, x, weights, scaling, means, what `sums` left) -> dx, in the dtype of x: gamma / √(…) ·
    # (dy − w · means.outputs − w · x̂ · means.normalized)
    gradient: Callable[[Any, Any, Any | None, Scaling, CotangentSums, Any | None], Any]


def statistics_dtype(dtype: Any) -> Any:
    """The dtype that inputs of this one are computed in."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def where_counted(weights: Any | None, x: Any) -> Any:
    """The view with 0 in place of what has no weight."""
    return x if weights is None else tf.where(weights > 0, x, tf.zeros((), x.dtype))
