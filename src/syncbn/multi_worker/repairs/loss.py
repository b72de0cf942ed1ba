"""The loss of the global batch: every replica's share of it, divided by what all of them count.

Keras takes the mean over a replica's own part and divides by the number of replicas, a mean of
means: wrong for parts of unequal sizes, masks or weights. A number from a loss function is not
divided at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src import ops, tree
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.losses import loss as keras_loss
from keras.src.metrics.reduction_metrics import Mean
from keras.src.trainers.trainer import Trainer

from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import in_replica, replica_count, sum_over_replicas
from syncbn.multi_worker.share import current_share, fraction_of_batch

__all__ = ["is_needed", "patches"]


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
        Patch(keras_loss.Loss, "__call__", _noting("terms")),
        Patch(Mean, "update_state", _tracker),
        Patch(Trainer, "compute_loss", _noting("losses")),
        Patch(Trainer, "get_metrics_result", _noting("results")),
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
        return values if not in_replica() else values * ops.cast(fraction_of_batch(), values.dtype)
    loss = ops.sum(values)
    if reduction == "sum":
        return loss
    by_weight = reduction == "mean_with_sample_weight"
    divisor = _divisor(values, weight if by_weight else None, mask, total)
    return ops.divide_no_nan(loss, ops.cast(divisor, loss.dtype))


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
        share = current_share()
        of_step = share is not None and id(value) in share.losses
        value = tf.stop_gradient(ops.convert_to_tensor(value))
        if value.shape.rank == 0 and of_step and share is not None:
            return share.as_mean(value)
        if value.shape.rank == 0:
            return sum_over_replicas(value)
        # A loss without a reduction: what is reported is its mean.
        terms = tf.stack([tf.reduce_sum(value), tf.cast(tf.size(value), value.dtype)])
        return tf.math.divide_no_nan(*tf.unstack(sum_over_replicas(terms)))

    return unscale_loss_for_distribution


def _tracker(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def update_state(metric: Any, values: Any, sample_weight: Any = None) -> None:
        """The whole loss, where a `train_step` of the user tracks the share that it has taken."""
        share = current_share() if in_replica() else None
        if share is not None and share.is_loss(values):
            values = sum_over_replicas(tf.stop_gradient(values))
        original(metric, values, sample_weight)

    return update_state


def _adder(original: Callable[..., Any]) -> Callable[..., Any]:
    def _aggregate_additional_loss(model: Any, loss: Any) -> Any:
        if not in_replica():
            return original(model, loss)
        loss = Trainer._aggregate_additional_loss(model, loss)
        fraction = ops.cast(fraction_of_batch(), loss.dtype)
        # The mean over an empty part is 0 / 0.
        return ops.where(fraction > 0, loss, ops.zeros_like(loss)) * fraction

    return _aggregate_additional_loss


def _noting(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Remember what a method returns, so that a step's report knows it when it sees it again."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            share = current_share() if in_replica() else None
            if share is not None:
                share.note(name, tree.flatten(result))
            return result

        return method

    return wrap
