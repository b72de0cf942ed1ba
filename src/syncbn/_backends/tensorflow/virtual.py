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
from syncbn._backends.tensorflow.scaling import statistics_dtype, where_counted
from syncbn._backends.tensorflow.views import channels_last
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
    moments, rough, rest = _moments(layout)
    dtype = collectives.moments_dtype()
    channels = layout.x.shape[-1]
    # A row for each virtual batch, of which only the count and the channels are left.
    rows = [tf.reshape(part, (-1, part.shape[-1])) for part in moments]
    table = tf.concat([tf.cast(part, dtype) for part in rows], axis=1)
    local = merge_table(table, xp, one_count=rows[0].shape[1] == 1)
    if scheme.watch is not None:
        scheme.watch(local)
    _, union = health.exchange(local, None, batch.state, scheme.checked_layer)
    gamma, beta = affine(union)
    scale = tf.math.rsqrt(moments.variance(xp) + scheme.epsilon)
    if gamma is not None:
        scale *= tf.cast(gamma, scale.dtype)
    offset = tf.zeros(channels, scale.dtype) if beta is None else tf.cast(beta, scale.dtype)
    # The mean is in two parts: `x − rough` is exact where the mean is large.
    offset -= rest * scale

    # What is masked gets an output by the statistics, and no gradient goes through it.
    outputs = tf.where(
        layout.weights > 0,
        (where_counted(layout.weights, layout.x) - rough) * scale + offset,
        tf.stop_gradient((layout.x - rough) * scale + offset),
    )
    outputs = layout.restored(tf.cast(outputs, batch.inputs.dtype))
    return (outputs if scheme.activation is None else scheme.activation(outputs)), union


class _Layout(NamedTuple):
    """The examples by virtual batch, filled up with elements of weight 0."""

    x: Any  # shape (virtual batches, examples of one, …, channels)
    weights: Any  # the same, but 1 or all channels
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
        dtype = statistics_dtype(batch.inputs.dtype)
        to_last, from_last = channels_last(rank, axis)
        x = tf.transpose(tf.cast(batch.inputs, dtype), to_last)
        (channels,) = next(iter(batch.state.values())).shape
        examples, spatial = tf.shape(x)[0], tf.shape(x)[1:-1]
        weights = tf.ones([1] * rank, dtype)
        if batch.weights is not None:
            weights = tf.transpose(tf.cast(batch.weights, dtype), to_last)
        width = 1 if weights.shape[-1] == 1 else channels
        # No more than there are, or the batch would be filled up to any size.
        size = tf.minimum(size, tf.maximum(examples, 1))
        missing = -examples % size

        def by_batch(tensor: Any, width: int) -> Any:
            tensor = tf.broadcast_to(tensor, tf.concat([[examples], spatial, [width]], axis=0))
            tensor = tf.pad(tensor, [[0, missing]] + [[0, 0]] * (rank - 1))
            split = tf.concat([[(examples + missing) // size, size], spatial, [width]], axis=0)
            return tf.ensure_shape(tf.reshape(tensor, split), [None] * rank + [width])

        def restored(y: Any) -> Any:
            y = tf.reshape(y, tf.concat([[examples + missing], spatial, [channels]], axis=0))
            y = tf.transpose(y[:examples], from_last)
            return tf.ensure_shape(y, batch.inputs.shape)

        return cls(by_batch(x, channels), by_batch(weights, width), restored)


def _moments(layout: _Layout) -> tuple[Moments, Any, Any]:
    """Moments of each virtual batch, shape (batches, 1, …, C), and the two parts of the mean."""

    def total(values: Any) -> Any:
        # Axis by axis: one float32 sum over all of them would lose digits.
        for axis in reversed(range(1, values.shape.rank - 1)):
            values = tf.reduce_sum(values, axis=axis, keepdims=True)
        return values

    count = total(layout.weights)
    divisor = as_divisor(count, xp)
    # A mean that is only nearly right, which everything below is independent of.
    counted = where_counted(layout.weights, layout.x)
    rough = tf.stop_gradient(total(layout.weights * counted) / divisor)
    deviations = where_counted(layout.weights, layout.x - rough)
    rest = total(layout.weights * deviations) / divisor
    m2 = total(layout.weights * tf.square(deviations)) - count * tf.square(rest)
    return Moments(count, rough + rest, tf.maximum(m2, 0)), rough, rest
