"""How a layer's moving statistics follow the batches, its renormalization's too."""

from __future__ import annotations

from typing import Any

from keras import ops

from syncbn._keras import xp
from syncbn.moments import Moments

__all__ = ["add_renorm_weights", "move_statistics"]


def move_statistics(layer: Any, moments: Moments) -> None:
    """`moving · momentum + batch · (1 − momentum)`; nothing moves by an empty global batch.

    Args:
        layer: a SyncBatchNormalization, built.
        moments: of the union of all replicas.
    """
    dtype = moments.mean.dtype
    any_element = ops.cast(moments.count > 0, dtype)

    def move(moving: Any, batch: Any, share: Any) -> Any:
        # Not `old + (batch − old) · share`, which is not the batch where the share is 1.
        moved = ops.cast(moving, dtype) * (1 - share) + batch * share
        moving.assign(ops.cast(moved, moving.dtype))  # variables of tf_keras do not cast
        return moved

    variance = moments.variance(xp)
    kept = moments.unbiased_variance(xp) if layer.unbiased_moving_variance else variance
    share = any_element * _next_share(layer, any_element)
    move(layer.moving_mean, moments.mean, share)
    if not layer.renorm:
        move(layer.moving_variance, kept, share)
        return
    renorm_share = any_element * (1.0 - layer.renorm_momentum)
    move(layer.renorm_mean, moments.mean, renorm_share)
    move(layer.renorm_stddev, ops.sqrt(variance + layer.epsilon), renorm_share)
    # As Keras: the deviation moves, and inference's variance is its square.
    deviation = move(layer.moving_stddev, ops.sqrt(kept + layer.epsilon), share)
    squared = xp.maximum(deviation * deviation - layer.epsilon, 0.0)
    old = ops.cast(layer.moving_variance, dtype)
    kept = ops.where(moments.count > 0, squared, old)
    layer.moving_variance.assign(ops.cast(kept, layer.moving_variance.dtype))


def _next_share(layer: Any, any_element: Any) -> Any:
    """The share of this batch; without momentum `1/k`, so that all k batches have the same."""
    if layer.momentum is not None:
        return 1.0 - layer.momentum
    batches = layer.num_batches_tracked
    dtype = batches.dtype
    batches.assign(ops.cast(batches, dtype) + ops.cast(ops.max(any_element), dtype))
    return 1.0 / ops.cast(ops.maximum(batches, 1), any_element.dtype)


def add_renorm_weights(layer: Any) -> None:
    """The moving statistics of batch renormalization, as Keras makes them since 3.13."""

    def deviation(shape: Any, dtype: Any = None) -> Any:
        return ops.sqrt(_again(layer.moving_variance_initializer)(shape, dtype=dtype))

    for name, initializer in (
        ("moving_stddev", deviation),
        ("renorm_mean", _again(layer.moving_mean_initializer)),
        ("renorm_stddev", deviation),
    ):
        weight = layer.add_weight(
            name=name,
            shape=layer.moving_mean.shape,
            initializer=initializer,
            trainable=False,
            autocast=False,
        )
        setattr(layer, name, weight)


def _again(initializer: Any) -> Any:
    """The initializer with a seed of its own."""
    return initializer.__class__.from_config(initializer.get_config())
