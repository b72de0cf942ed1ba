"""Where the code runs: on how many replicas, in which of their contexts, on which worker."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from syncbn.errors import NotSynchronizableError

__all__ = [
    "SAME_SHAPE",
    "in_replica",
    "is_multi_worker",
    "local_replica_count",
    "replica_count",
    "sum_over_replicas",
    "worker_count",
    "worker_index",
]

# The name scope of sums of tensors whose shape depends on no batch; see repairs/instance_keys.py.
SAME_SHAPE = "same_shape_on_every_replica"


def replica_count(strategy: Any = None) -> int:
    """How many replicas the strategy (by default the one whose scope this is) trains on."""
    strategy = strategy or tf.distribute.get_strategy()
    return int(strategy.num_replicas_in_sync)


def in_replica() -> bool:
    """Whether this runs as one of several replicas, inside `strategy.run`."""
    return replica_count() > 1 and not tf.distribute.in_cross_replica_context()


def is_multi_worker(strategy: Any) -> bool:
    """Whether other processes train with this one."""
    extended = strategy.extended
    return bool(getattr(extended, "_in_multi_worker_mode", lambda: False)())


def local_replica_count(strategy: Any) -> int:
    """How many of the replicas are in this process."""
    return len(strategy.extended.worker_devices)


def worker_count(strategy: Any) -> int:
    """How many processes train together."""
    return replica_count(strategy) // local_replica_count(strategy)


def worker_index(strategy: Any) -> int:
    """The number of this worker in the cluster, the chief's being 0."""
    return int(strategy.extended._id_in_cluster) if is_multi_worker(strategy) else 0


def sum_over_replicas(value: Any) -> Any:
    """The sum of every replica's tensor (or of each of a list of them), on each replica.

    For numbers and values of variables, of which no gradient is asked. Within one process they are
    added up on the first device: a collective, which is made for gradients, takes several times as
    long.

    Raises:
        NotSynchronizableError: the replicas cannot meet inside this graph.
    """
    context = tf.distribute.get_replica_context()
    # What is read from a variable may not say on which device it is, which the collective asks.
    placed = tf.nest.map_structure(tf.identity, value)
    if is_multi_worker(context.strategy):
        with tf.name_scope(SAME_SHAPE):
            return context.all_reduce(tf.distribute.ReduceOp.SUM, placed)

    def add(strategy: Any, *values: Any) -> Any:
        return [tf.add_n(strategy.experimental_local_results(value)) for value in values]

    try:
        flat = context.merge_call(add, args=tuple(tf.nest.flatten(placed)))
    except RuntimeError as error:
        if "merge_call" not in str(error):
            raise
        raise NotSynchronizableError(
            "Sharing a batch out over the replicas requires that they meet where its loss is "
            "taken. Received: a loss or metric inside tf.cond, tf.while_loop or a tf.function of "
            "its own within the step. Take it outside of them, or leave the repair 'loss' out: "
            "enable_multi_worker(without=['loss'])."
        ) from error
    return tf.nest.pack_sequence_as(value, list(flat))
