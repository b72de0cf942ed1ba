"""Sums over the replicas of a `tf.distribute` strategy, and the moments that they give."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from syncbn._backends.tensorflow.namespace import xp
from syncbn.errors import NotSynchronizableError
from syncbn.moments import Moments, merge_table, pack_row, pack_sums, unpack_sums

__all__ = ["global_moments", "replica_count", "sum_over_replicas"]


def replica_count() -> int:
    """How many replicas train in step with this one, itself included.

    Raises:
        NotSynchronizableError: the code runs where the replicas cannot meet.
    """
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, _PARAMETER_SERVER_STRATEGIES):
        raise NotSynchronizableError(
            "Synchronized batch normalization requires replicas that train in step, as under "
            "MirroredStrategy, MultiWorkerMirroredStrategy or TPUStrategy. Received: "
            f"{type(strategy).__name__}, whose workers train asynchronously, each at its own "
            "pace. Train under one of those strategies, or use keras.layers.BatchNormalization, "
            "which normalizes by the batch of one worker."
        )
    if tf.distribute.get_replica_context() is None:
        raise NotSynchronizableError(
            "Synchronized training requires a replica context, where each replica holds its part "
            "of the global batch. Received: a call with training=True in the cross-replica "
            f"context of {type(strategy).__name__}. Call the model inside strategy.run(step, "
            "args=(batch,)) or through model.fit; inside `with strategy.scope():` only build it."
        )
    return int(strategy.num_replicas_in_sync)


def sum_over_replicas(vector: Any) -> Any:
    """The elementwise sum of every replica's vector, the same bits on all of them.

    One collective; differentiable (the gradient of a sum over replicas is the sum over replicas of
    the gradients). Every replica must come here, also one whose part of the batch is empty.

    Raises:
        NotSynchronizableError: the strategy cannot start a collective inside this graph.
    """
    context = tf.distribute.get_replica_context()
    try:
        return context.all_reduce(tf.distribute.ReduceOp.SUM, vector)
    except RuntimeError as error:
        if "merge_call" not in str(error):
            raise
        raise NotSynchronizableError(
            "Synchronized training requires that the layer is called in the graph of the function "
            "given to strategy.run. Received: a call inside tf.cond, tf.while_loop or a nested "
            f"tf.function there ({tf.compat.v1.get_default_graph().name!r}), where "
            "TensorFlow cannot start a collective. Move the condition or the loop around "
            "strategy.run, or remove the inner @tf.function; to switch normalization itself, "
            "select between two results with tf.where."
        ) from error


def global_moments(local: Moments) -> Moments:
    """Moments of the concatenated batch of all replicas; one collective, none for one replica."""
    replicas = replica_count()
    if replicas == 1:
        return local
    if _has_float64():
        payload = pack_sums(Moments(*(tf.cast(part, tf.float64) for part in local)), xp)
        return unpack_sums(sum_over_replicas(payload), xp)
    row = pack_row(Moments(*(tf.cast(part, tf.float32) for part in local)), xp)
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    table = tf.one_hot(replica, replicas, dtype=row.dtype)[:, None] * row
    return merge_table(sum_over_replicas(table), xp)


def _has_float64() -> bool:
    """Whether this strategy's collectives carry float64: a TPU's do not."""
    return not isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)


_PARAMETER_SERVER_STRATEGIES = (
    tf.distribute.experimental.ParameterServerStrategy,
    tf.distribute.ParameterServerStrategy,
    tf.compat.v1.distribute.experimental.ParameterServerStrategy,
)
