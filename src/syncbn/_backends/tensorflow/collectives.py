"""Sums over the replicas of a `tf.distribute` strategy, and the moments that they give."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._backends.tensorflow.graphs import is_function_inside_a_loop
from syncbn._backends.tensorflow.namespace import xp
from syncbn.errors import NotSynchronizableError
from syncbn.groups import Groups
from syncbn.moments import Moments, merge_table, pack_row, pack_sums, unpack_sums

__all__ = [
    "SAME_SHAPE",
    "WITHOUT_MIRRORED_VARIABLES",
    "Exchanged",
    "check_owner",
    "exchange",
    "moments_dtype",
    "replica_count",
    "rows_of_replicas",
    "sum_over_group",
    "sum_over_replicas",
]

# By this name scope the repair of TensorFlow's growing memory knows sums of vectors whose length
# depends on no batch; it is syncbn.multi_worker's, which stands apart and can go away.
SAME_SHAPE = "same_shape_on_every_replica"


def replica_count() -> int:
    """How many replicas train in step with this one, itself included.

    Raises:
        NotSynchronizableError: the code runs where the replicas cannot meet.
    """
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, WITHOUT_MIRRORED_VARIABLES):
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
        with tf.name_scope(SAME_SHAPE):
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


class Exchanged(NamedTuple):
    """What every replica knows after the forward collective."""

    own: Moments  # of the group that this replica normalizes with
    union: Moments  # of all replicas; the same bits on each
    faults: Any | None  # shape (R,): the number that each replica gave


def exchange(local: Moments, groups: Groups | None = None, fault: Any | None = None) -> Exchanged:
    """Moments of the concatenated batch, by one collective; by none for one replica.

    The payload of the forward collective: `(n, n·mean, M2 + n·mean²)`, 2C+1 float64, a row for each
    group where there are several; in float32 a row of `(n, mean, M2)` for each replica. A sum over
    all replicas is the only collective that every strategy has, so groups are rows of one table,
    which also gives each replica what it needs for the moving statistics.

    Args:
        local: those of this replica's part, in `moments_dtype()`.
        groups: lists of replicas, each of which normalizes by itself; None for one group of all.
        fault: a number to tell the others, or None for nothing.
    """
    replicas = replica_count()
    one_count = len(local.count.shape) == 0
    as_sums = moments_dtype() == tf.float64
    if as_sums and groups is None and fault is None and replicas > 1:
        # What nearly every call is, with as few operations as can be.
        total = sum_over_replicas(pack_sums(local, xp))
        union = unpack_sums(total, xp, one_count=one_count)
        return Exchanged(union, union, None)
    if replicas == 1:
        return Exchanged(local, local, None if fault is None else fault[None])
    row = pack_sums(local, xp) if as_sums else pack_row(local, xp)
    if not as_sums:
        table = _in_slot(row, _this_replica(), replicas)
    elif groups is None:
        table = row[None]
    else:
        table = _in_slot(row, _this_group(groups), len(groups))
    numbers = [tf.reshape(table, (-1,))]
    if fault is not None:
        numbers.append(_in_slot(fault[None], _this_replica(), replicas)[:, 0])
    total = sum_over_replicas(tf.concat(numbers, axis=0))
    faults = None if fault is None else total[-replicas:]
    table = tf.reshape(total if fault is None else total[:-replicas], table.shape)
    own, union = (_of_sums if as_sums else _of_table)(table, groups, one_count)
    return Exchanged(own, union, faults)


def _of_sums(table: Any, groups: Groups | None, one_count: bool) -> tuple[Moments, Moments]:
    unpack = functools.partial(unpack_sums, xp=xp, one_count=one_count)
    if groups is None:
        union = unpack(tf.reshape(table, (-1,)))
        return union, union
    return unpack(table[_this_group(groups)]), unpack(tf.reduce_sum(table, axis=0))


def _of_table(table: Any, groups: Groups | None, one_count: bool) -> tuple[Moments, Moments]:
    merge = functools.partial(merge_table, xp=xp, one_count=one_count)
    union = merge(table)
    if groups is None:
        return union, union
    members = tf.gather(_group_of_each(groups), tf.range(table.shape[0])) == _this_group(groups)
    return merge(tf.where(members[:, None], table, 0.0)), union


def sum_over_group(vector: Any, groups: Groups | None = None) -> Any:
    """The sum of the vector over this replica's group, by one collective; none where it is alone.

    Args:
        vector: shape (n,).
        groups: who belongs together; None for all.
    """
    if replica_count() == 1 or (groups is not None and all(len(group) == 1 for group in groups)):
        return vector
    if groups is None:
        return sum_over_replicas(vector)
    table = _in_slot(vector, _this_group(groups), len(groups))
    flat = sum_over_replicas(tf.reshape(table, (-1,)))
    return tf.reshape(flat, table.shape)[_this_group(groups)]


def rows_of_replicas(row: Any, replicas: int) -> Any:
    """The row of each replica, shape (R, n), the same bits on all of them; one collective.

    Args:
        row: shape (n,), of one size on every replica.
        replicas: R.
    """
    return sum_over_replicas(_in_slot(row, _this_replica(), replicas))


def _this_replica() -> Any:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def _group_of_each(groups: Groups) -> Any:
    """The number of the group of each replica, shape (R,)."""
    group_of = {replica: number for number, group in enumerate(groups) for replica in group}
    return tf.constant([group_of[replica] for replica in sorted(group_of)])


def _this_group(groups: Groups) -> Any:
    return _group_of_each(groups)[_this_replica()]


def _in_slot(vector: Any, slot: Any, slots: int) -> Any:
    """A table of shape (slots, …) of zeros with the vector in one row.

    Not a product with a one-hot vector: a NaN would enter every row.
    """
    return tf.where(tf.range(slots)[:, None] == slot, vector, tf.zeros((), vector.dtype))


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

WITHOUT_MIRRORED_VARIABLES = (
    tf.distribute.experimental.CentralStorageStrategy,
    tf.distribute.experimental.ParameterServerStrategy,
    tf.distribute.ParameterServerStrategy,
    tf.compat.v1.distribute.experimental.CentralStorageStrategy,
    tf.compat.v1.distribute.experimental.ParameterServerStrategy,
)
