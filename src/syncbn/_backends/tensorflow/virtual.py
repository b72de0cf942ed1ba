"""Virtual ("ghost") batches: a few examples of a replica that normalize by themselves.

Only the moving statistics are synchronized, so that TensorFlow's own gradient is the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._backends.interface import Batch, Scheme
from syncbn._backends.tensorflow import collectives, health
from syncbn._backends.tensorflow.namespace import xp
from syncbn.errors import InputError
from syncbn.moments import Moments, as_divisor, merge_table

__all__ = ["normalize"]


def normalize(
    batch: Batch, scheme: Scheme, affine: Callable[[Moments], tuple[Any | None, Any | None]]
) -> tuple[Any, Moments]:
    """Normalize every `virtual_batch_size` examples by their own moments, the last fewer by theirs.

    Returns:
        The outputs, and the moments of the union of all examples of all replicas; one collective.
    """
    layout = _Layout.of(batch, scheme.virtual_batch_size or 1)
    moments, mean, variance = _moments(layout)
    dtype = collectives.moments_dtype()
    rows = [tf.cast(part, dtype) for part in moments]
    local = merge_table(tf.concat([rows[0][:, None], *rows[1:]], axis=1), xp)
    _, union = health.exchange(local, None, batch.state, scheme.checked_layer)
    gamma, beta = affine(union)
    scale = tf.math.rsqrt(variance + scheme.epsilon)
    if gamma is not None:
        scale *= tf.cast(gamma, scale.dtype)
    offset = tf.zeros((), scale.dtype) if beta is None else tf.cast(beta, scale.dtype)

    def apply(x: Any) -> Any:
        return (x - mean) * scale + offset

    # What is masked gets an output by the statistics, and no gradient goes through it.
    kept = layout.weights > 0
    outputs = tf.where(kept, apply(layout.counted()), tf.stop_gradient(apply(layout.x)))
    outputs = layout.restored(tf.cast(outputs, batch.inputs.dtype))
    return (outputs if scheme.activation is None else scheme.activation(outputs)), union


class _Layout(NamedTuple):
    """The examples by virtual batch, filled up with elements of weight 0."""

    x: Any  # shape (virtual batches, elements, channels)
    weights: Any  # shape (virtual batches, elements, 1)
    restored: Callable[[Any], Any]  # from the shape of x to that of the inputs

    @classmethod
    def of(cls, batch: Batch, size: int) -> _Layout:
        rank = batch.inputs.shape.rank
        axis = batch.axis % rank
        if axis == 0:
            raise InputError(
                "virtual_batch_size requires examples on the first axis of the inputs. Received: "
                f"axis={batch.axis} for inputs of rank {rank}, whose channels are there. Remove "
                "virtual_batch_size."
            )
        dtype = tf.float64 if batch.inputs.dtype == tf.float64 else tf.float32
        to_last = [*range(axis), *range(axis + 1, rank), axis]
        from_last = [*range(axis), rank - 1, *range(axis, rank - 1)]
        x = tf.transpose(tf.cast(batch.inputs, dtype), to_last)
        (channels,) = next(iter(batch.state.values())).shape
        shape = tf.concat([tf.shape(x)[:-1], [channels]], axis=0)
        examples, elements = shape[0], tf.reduce_prod(shape[1:-1])
        weights = tf.ones((), dtype) if batch.weights is None else tf.cast(batch.weights, dtype)
        missing = -examples % size

        def by_batch(tensor: Any, channels: int) -> Any:
            flat = tf.pad(
                tf.reshape(tensor, (examples, elements, channels)), [[0, missing], [0, 0], [0, 0]]
            )
            batches = (examples + missing) // size
            return tf.reshape(flat, (batches, size * elements, channels))

        def restored(y: Any) -> Any:
            y = tf.reshape(y, (examples + missing, elements, channels))[:examples]
            y = tf.transpose(tf.reshape(y, shape), from_last)
            return tf.ensure_shape(y, batch.inputs.shape)

        return cls(
            by_batch(x, channels), by_batch(tf.broadcast_to(weights, shape[:-1]), 1), restored
        )

    def counted(self) -> Any:
        """The examples with 0 where nothing counts."""
        return tf.where(self.weights > 0, self.x, tf.zeros((), self.x.dtype))


def _moments(layout: _Layout) -> tuple[Moments, Any, Any]:
    """Moments a row for each virtual batch, and its mean and variance, shape (batches, 1, C)."""

    def total(values: Any) -> Any:
        return tf.reduce_sum(values, axis=1, keepdims=True)

    count = total(layout.weights)
    divisor = as_divisor(count, xp)
    # A mean that is only nearly right, which everything below is independent of.
    rough = tf.stop_gradient(total(layout.weights * layout.counted()) / divisor)
    deviations = tf.where(layout.weights > 0, layout.x - rough, tf.zeros((), rough.dtype))
    rest = total(layout.weights * deviations) / divisor
    variance = tf.maximum(total(layout.weights * tf.square(deviations)) / divisor - rest**2, 0)
    mean = rough + rest
    rows = Moments(count[:, 0, 0], mean[:, 0], (variance * count)[:, 0])
    return rows, mean, variance
