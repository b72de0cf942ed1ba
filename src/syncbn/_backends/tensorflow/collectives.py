"""Sums over the replicas of a `tf.distribute` strategy, and the moments that they give."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from syncbn._backends.tensorflow.graphs import is_function_inside_a_loop
from syncbn._backends.tensorflow.namespace import xp
from syncbn.errors import NotSynchronizableError
from syncbn.moments import Moments, merge_table, pack_row, pack_sums, unpack_sums

__all__ = ["check_owner", "global_moments", "moments_dtype", "replica_count", "sum_over_replicas"]


def replica_count() -> int:
    """How many replicas train in step with this one, itself included.

    Raises:
        NotSynchronizableError: the code runs where the replicas cannot meet.
    """
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, _WITHOUT_MIRRORED_VARIABLES):
        raise NotSynchronizableError(
            "Synchronized batch normalization requires replicas that train in step, each with its "
            "own copy of the variables, as under MirroredStrategy, MultiWorkerMirroredStrategy or "
            f"TPUStrategy. Received: {type(strategy).__name__}. Train under one of those, or use "
            "keras.layers.BatchNormalization, which normalizes by the batch of one replica."
        )
    if tf.distribute.get_replica_context() is None:
        raise NotSynchronizableError(
            "Synchronized training requires a replica context, where each replica holds its part "
            "of the global batch. Received: a call with training=True in the cross-replica "
            f"context of {type(strategy).__name__}. Call the model inside strategy.run(step, "
            "args=(batch,)) or through model.fit; inside `with strategy.scope():` only build it."
        )
    return int(strategy.num_replicas_in_sync)


def check_owner(state: Any) -> None:
    """Make sure that the variables of the layer belong to the replicas that train now.

    Args:
        state: any variable of the layer.

    Raises:
        NotSynchronizableError: they were made under another strategy. Training would go on, each
            worker by its own batch, or each replica moving the same variable.
    """
    replicas = replica_count()
    current = tf.distribute.get_strategy()
    owner = getattr(state, "distribute_strategy", None)
    if owner is current:
        return
    if owner is not None and owner.num_replicas_in_sync > 1:
        raise NotSynchronizableError(
            f"Synchronized training of a layer made under {type(owner).__name__} with "
            f"{owner.num_replicas_in_sync} replicas requires that strategy's replica context. "
            f"Received: a call with training=True outside of it, under {type(current).__name__}. "
            "Call the model inside strategy.run(step, args=(batch,)), and not within "
            "tf.py_function or Dataset.map there."
        )
    if replicas > 1:
        raise NotSynchronizableError(
            f"Synchronized training on the {replicas} replicas of {type(current).__name__} "
            "requires a layer with a copy of its variables on each. Received: a layer that was "
            "made outside of it. Build the model inside `with strategy.scope():`."
        )


def sum_over_replicas(vector: Any) -> Any:
    """The elementwise sum of every replica's vector, the same bits on all of them.

    One collective; differentiable (the gradient of a sum over replicas is the sum over replicas of
    the gradients). Every replica must come here, also one whose part of the batch is empty.

    Raises:
        NotSynchronizableError: the strategy cannot start a collective inside this graph.
    """
    context = tf.distribute.get_replica_context()
    graph = tf.compat.v1.get_default_graph()
    if "loop_body" in tf.get_current_name_scope().split("/"):
        # tf.vectorized_map, by the scope it traces in: its loop of collectives would hang.
        raise NotSynchronizableError(_outside_of_run("tf.vectorized_map", graph))
    try:
        total = context.all_reduce(tf.distribute.ReduceOp.SUM, vector)
    except RuntimeError as error:
        if "merge_call" not in str(error):
            raise
        place = "tf.cond, tf.while_loop or a nested tf.function"
        raise NotSynchronizableError(_outside_of_run(place, graph)) from error
    if not tf.executing_eagerly() and is_function_inside_a_loop(graph):
        _refuse_collectives(graph)
    return total


def _outside_of_run(place: str, graph: Any) -> str:
    return (
        "Synchronized training requires that the layer is called in the graph of the function "
        f"given to strategy.run. Received: a call inside {place} there ({graph.name!r}), where "
        "TensorFlow cannot start a collective. Move the condition or the loop around "
        "strategy.run, or remove the inner @tf.function; to switch normalization itself, select "
        "between two results with tf.where."
    )


def _refuse_collectives(graph: Any) -> None:
    """Say in time what else fails in the first step as "must feed a value for placeholder".

    TensorFlow numbers a collective when the outermost function is called, and does not hand the
    number into a function that is called in a loop.
    """
    if any(operation.type.startswith("Collective") for operation in graph.get_operations()):
        raise NotSynchronizableError(
            "Synchronized training requires collectives that TensorFlow can number. Received: a "
            "tf.function given to strategy.run inside tf.while_loop or tf.cond, as in Keras's fit "
            "with steps_per_execution > 1 under a strategy (Keras's own training fails there too, "
            "with any layer). Set steps_per_execution=1; in a loop of your own give strategy.run "
            "a plain function and decorate the loop with @tf.function."
        )


def global_moments(local: Moments) -> Moments:
    """Moments of the concatenated batch of all replicas; one collective, none for one replica.

    Args:
        local: those of this replica's part, in `moments_dtype()`.
    """
    replicas = replica_count()
    if replicas == 1:
        return local
    if moments_dtype() == tf.float64:
        return unpack_sums(sum_over_replicas(pack_sums(local, xp)), xp)
    row = pack_row(local, xp)
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    table = tf.one_hot(replica, replicas, dtype=row.dtype)[:, None] * row
    return merge_table(sum_over_replicas(table), xp)


def moments_dtype() -> Any:
    """The dtype of the moments that replicas exchange: float64, but float32 on TPU."""
    return tf.float64 if _has_float64() else tf.float32


def _has_float64() -> bool:
    """Whether this strategy's collectives carry float64: a TPU's do not."""
    return not isinstance(tf.distribute.get_strategy(), _TPU_STRATEGIES)


# Three classes, none of them a base of another.
_TPU_STRATEGIES = (
    tf.distribute.TPUStrategy,
    tf.distribute.experimental.TPUStrategy,
    tf.compat.v1.distribute.experimental.TPUStrategy,
)

_WITHOUT_MIRRORED_VARIABLES = (
    tf.distribute.experimental.CentralStorageStrategy,
    tf.distribute.experimental.ParameterServerStrategy,
    tf.distribute.ParameterServerStrategy,
    tf.compat.v1.distribute.experimental.CentralStorageStrategy,
    tf.compat.v1.distribute.experimental.ParameterServerStrategy,
)
