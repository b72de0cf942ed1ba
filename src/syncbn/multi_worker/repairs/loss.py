"""The loss of the global batch: every replica's share of it, divided by what all of them count.

Keras takes the mean over a replica's own part and divides by the number of replicas, a mean of
means: wrong for parts of unequal sizes, masks or weights. A number from a loss function is not
divided at all.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src import ops
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.losses import loss as keras_loss
from keras.src.metrics.reduction_metrics import Mean, MeanMetricWrapper
from keras.src.trainers.trainer import Trainer

from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import in_replica, replica_count, sum_over_replicas
from syncbn.multi_worker.share import current_share, fraction_of_batch

__all__ = ["is_needed", "patches"]

_thread = threading.local()


def is_needed() -> bool:
    """Whether Keras divides a replica's mean by the number of replicas."""
    return source_probe(
        "keras.src.losses.loss.reduce_values",
        broken="loss = scale_loss_for_distribution(loss)",
        mended="all_reduce",
    )


def patches() -> list[Patch]:
    """How losses are reduced, reported and added up."""
    return [
        Patch(keras_loss, "reduce_weighted_values", _reducer),
        Patch(keras_loss, "unscale_loss_for_distribution", _reporter),
        Patch(TensorFlowTrainer, "_aggregate_additional_loss", _adder),
        Patch(keras_loss.Loss, "__call__", _nesting),
        Patch(Mean, "update_state", _tracker),
        Patch(MeanMetricWrapper, "update_state", _nesting),
    ]


def _reducer(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_weighted_values(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        if not in_replica():
            if replica_count() == 1:
                return original(values, sample_weight, mask, reduction, dtype)
            # Between the replicas there is the whole batch: nothing to share out.
            return _share_of_loss(values, sample_weight, mask, reduction, dtype, lambda x: x)
        return _share_of_loss(values, sample_weight, mask, reduction, dtype, sum_over_replicas)

    return reduce_weighted_values


def _share_of_loss(
    values: Any,
    sample_weight: Any,
    mask: Any,
    reduction: str | None,
    dtype: Any,
    total: Callable[[Any], Any],
) -> Any:
    """This replica's term of a sum over the replicas which is the loss of the global batch.

    One collective, also on an empty replica: of the sizes and weights by which Keras divides.
    """
    reduction = keras_loss.standardize_reduction(reduction)
    values = ops.convert_to_tensor(values, dtype=dtype)
    if sample_weight is not None:
        sample_weight = ops.convert_to_tensor(sample_weight, dtype=dtype)
    if mask is not None:
        mask = ops.convert_to_tensor(mask, dtype=dtype)
    weight = keras_loss.apply_mask(sample_weight, mask, dtype=values.dtype, reduction="sum")
    if weight is not None:
        weight = ops.cast(weight, values.dtype)
        values, weight = keras_loss.squeeze_or_expand_to_same_rank(values, weight)
        values = values * weight
    if reduction in (None, "none"):
        return values
    if values.shape.rank == 0:
        return values if not in_replica() else _part_of_mean(values)
    loss = ops.sum(values)
    if reduction == "sum":
        return _reported_whole(loss)
    by_weight = reduction == "mean_with_sample_weight"
    divisor = _divisor(values, weight if by_weight else None, mask, total)
    return _reported_whole(ops.divide_no_nan(loss, ops.cast(divisor, loss.dtype)))


def _part_of_mean(mean: Any) -> Any:
    """This replica's part of the mean over all examples, of a mean over its own."""
    fraction = ops.cast(fraction_of_batch(), mean.dtype)
    # The mean over an empty part is 0 / 0.
    return _reported_whole(ops.where(fraction > 0, mean, ops.zeros_like(mean)) * fraction)


def _reported_whole(part: Any) -> Any:
    """The gradient of this replica's part, and the value of a mean over its examples.

    So that whatever a `train_step` makes of it, adds it to others, tracks or returns it, the mean
    over all examples of that is the loss of the global batch. Within another loss, a layer or a
    metric it is such a mean altogether: those take their own part of it.
    """
    share = current_share() if in_replica() else None
    if share is None:
        return part if not _is_nested() else part * replica_count()
    mean = share.as_mean(part)
    if _is_nested():
        return mean
    # Not of what has overflowed: inf - inf would make it NaN.
    shift = tf.where(tf.math.is_finite(part), mean - part, tf.zeros_like(part))
    return part + tf.stop_gradient(shift)


def _is_nested() -> bool:
    """Whether a loss is taken within another one, a metric or the call of a layer."""
    in_layer = get_global_attribute("current_call_ctx") is not None
    return in_replica() and (in_layer or getattr(_thread, "depth", 0) > 1)


def _nesting(original: Callable[..., Any]) -> Callable[..., Any]:
    # What a metric's function takes is nested in it; a loss by itself is not.
    own = 1 if original.__name__ == "__call__" else 2

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        before = getattr(_thread, "depth", 0)
        _thread.depth = before + own
        try:
            return original(*args, **kwargs)
        finally:
            _thread.depth = before

    return method


def _divisor(values: Any, weight: Any, mask: Any, total: Callable[[Any], Any]) -> Any:
    """What Keras divides the sum by on one device: of all replicas, in one collective.

    The sum of the weights, or the number of values, of which a mask leaves its part: the divisor of
    `mean` with a mask is size · (what the mask keeps) / (what the mask has).
    """
    share = current_share() if in_replica() else None
    if weight is not None:
        terms = [ops.cast(ops.sum(weight), "float32")]
    elif mask is not None:
        terms = [_size(values), ops.cast(ops.sum(mask), "float32"), _size(mask)]
    else:
        terms = [_size(values)]
    if share is not None:
        terms.append(share.examples)
    sums = tf.unstack(total(tf.stop_gradient(tf.stack(terms))))
    if share is not None:
        share.learn(sums.pop())
    if len(sums) == 1:
        return sums[0]
    size, kept, masked = sums
    return tf.math.divide_no_nan(size * kept, masked)


def _size(values: Any) -> Any:
    return tf.cast(tf.size(values), tf.float32)


def _reporter(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def unscale_loss_for_distribution(value: Any) -> Any:
        """What Keras's trackers take, so that they come to the loss of the global batch."""
        if not in_replica():
            return original(value) if replica_count() == 1 else value
        value = tf.stop_gradient(ops.convert_to_tensor(value))
        if value.shape.rank == 0:
            return value
        # A loss without a reduction: what is reported is its mean.
        terms = tf.stack([tf.reduce_sum(value), tf.cast(tf.size(value), value.dtype)])
        return tf.math.divide_no_nan(*tf.unstack(sum_over_replicas(terms)))

    return unscale_loss_for_distribution


def _tracker(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def update_state(metric: Any, values: Any, sample_weight: Any = None) -> None:
        """A number a batch counts as much as the replica's part of the batch does."""
        share = current_share() if in_replica() else None
        if share is not None and sample_weight is None and _is_number(values):
            fraction = share.fraction()
            values = ops.cast(values, metric.dtype)
            values = ops.where(fraction > 0, values, ops.zeros_like(values))
            sample_weight = fraction
        original(metric, values, sample_weight)

    return update_state


def _adder(original: Callable[..., Any]) -> Callable[..., Any]:
    def _aggregate_additional_loss(model: Any, loss: Any) -> Any:
        if not in_replica():
            return original(model, loss)
        return _part_of_mean(Trainer._aggregate_additional_loss(model, loss))

    return _aggregate_additional_loss


def _is_number(values: Any) -> bool:
    shape = getattr(values, "shape", None)
    return shape is not None and len(shape) == 0
