"""The moving statistics of plain BatchNormalization, averaged over the replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from syncbn.errors import InputError
from syncbn.multi_worker.replicas import in_replica, replica_count, sum_over_replicas

__all__ = ["average_moving_statistics", "local_layers"]


def local_layers(model: Any) -> list[Any]:
    """The layers of a model that normalize each replica by its own statistics, by name."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        and not getattr(layer, "synchronized", False)
    ]


def average_moving_statistics(model: Any, counts: Sequence[float] | None = None) -> list[str]:
    """Give plain BatchNormalization, on every replica, the average of all replicas' statistics.

    moving_mean = Σ countᵣ · moving_meanᵣ / Σ countᵣ, and so moving_variance, as Keras 2 had them
    when they were read. Keras 3 saves and evaluates with those of the first replica. Call it after
    training, before saving, outside of `strategy.run`; with several workers on every one of them.
    It mends what is saved; that each replica was trained by its own statistics it cannot.

    Args:
        model: made inside the scope of its strategy.
        counts: of shape [R], what each replica's statistics weigh, in the order of the replicas. By
            default the number of examples that each has seen since the metrics were reset, as in
            the last epoch; equal weights where there are none. Statistics that are not finite
            (Keras leaves NaN on a replica whose part of a batch was empty) weigh nothing.

    Returns:
        The names of the layers, none where there is one replica.

    Raises:
        InputError: `counts` are not one number a replica, or all are 0; this runs in a replica.

    References:
        Keras 2, `BatchNormalization`, whose moving statistics are variables of
        `synchronization=ON_READ, aggregation=MEAN`.
    """
    strategy = model.distribute_strategy
    replicas, layers = replica_count(strategy), local_layers(model)
    if replicas == 1 or not layers:
        return []
    if in_replica():
        raise InputError(
            "average_moving_statistics() requires to be called outside of strategy.run, as it runs "
            "on all replicas itself. Received: a call on one of them."
        )
    weights = None if counts is None else _checked(counts, replicas)
    variables = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]

    def average() -> None:
        index = tf.distribute.get_replica_context().replica_id_in_sync_group
        count = _examples(model) if weights is None else tf.gather(tf.constant(weights), index)
        for variable in variables:
            own = tf.convert_to_tensor(variable.value)
            finite = tf.reduce_all(tf.math.is_finite(own))
            weight = tf.where(finite, tf.cast(count, own.dtype), 0)
            term = tf.where(finite, own, 0) * weight
            total, weight = sum_over_replicas([term, weight])
            variable.value.assign(tf.where(weight > 0, total / weight, own))

    with strategy.scope():
        tf.function(lambda: strategy.run(average), autograph=False)()
    return [layer.name for layer in layers]


def _checked(counts: Sequence[float], replicas: int) -> list[float]:
    weights = [float(count) for count in counts]
    if len(weights) != replicas or not all(0 <= w < math.inf for w in weights) or not sum(weights):
        raise InputError(
            f"`counts` requires {replicas} numbers, one a replica, not negative and not all 0. "
            f"Received: {counts}."
        )
    return weights


def _examples(model: Any) -> Any:
    """How many examples this replica has seen, or 1 if none of them has seen any."""
    tracker = getattr(model, "_loss_tracker", None)
    if tracker is None:
        return tf.constant(1.0)
    count = tf.convert_to_tensor(tracker.count.value)
    return tf.where(sum_over_replicas(count) > 0, count, tf.ones_like(count))
