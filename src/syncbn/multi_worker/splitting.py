"""Splits a batch that was given as a whole over the replicas of all workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from keras.src import tree

from syncbn.multi_worker.replicas import (
    local_replica_count,
    replica_count,
    worker_count,
    worker_index,
)

__all__ = ["split"]


def split(strategy: Any, batch: Any) -> Any:
    """Each replica's part of every array: in order, of sizes that differ by one at most.

    On several workers each is given the same batch and keeps its own part. An array shorter than
    there are replicas leaves some of them an empty part.
    """
    replicas = replica_count(strategy)

    def distribute(array: Any) -> Any:
        if array is None or isinstance(array, tf.distribute.DistributedValues):
            return array
        array = array if hasattr(array, "shape") else np.asarray(array)
        size, rest = divmod(int(array.shape[0]), replicas)
        ends = np.cumsum([0] + [size + (index < rest) for index in range(replicas)])

        def part(context: Any) -> Any:
            # As datasets are dealt out, one part to each worker in turn, and as Keras puts
            # predictions together again.
            local = context.replica_id_in_sync_group % local_replica_count(strategy)
            index = local * worker_count(strategy) + worker_index(strategy)
            return tf.convert_to_tensor(array[ends[index] : ends[index + 1]])

        return strategy.experimental_distribute_values_from_function(part)

    return tree.map_structure(distribute, batch)
