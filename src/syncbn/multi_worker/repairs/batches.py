"""`train_on_batch`, `test_on_batch` and `predict_on_batch` split the batch over the replicas.

Keras gives every replica the whole of it: predictions come several times, and a batch counts as
often as there are replicas. On several workers each is given the same batch and reads its part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src import tree
from keras.src.backend.tensorflow import trainer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

from syncbn.errors import UnsupportedFeatureError
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import replica_count

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras hands the batch on as it is."""
    return source_probe(
        "keras.src.backend.tensorflow.trainer.TensorFlowTrainer.predict_on_batch",
        broken="batch_outputs = self.predict_function([(x,)])",
        mended="experimental_distribute_values_from_function",
    )


def patches() -> list[Patch]:
    """The three methods, by the function that they call; how predictions are joined."""
    return [
        Patch(TensorFlowTrainer, "make_train_function", _splitting("train_function")),
        Patch(TensorFlowTrainer, "make_test_function", _splitting("test_function")),
        Patch(TensorFlowTrainer, "predict_on_batch", _predictor),
        Patch(trainer, "reduce_per_replica", _joiner),
    ]


def split(strategy: Any, batch: Any) -> Any:
    """Each replica's part of a batch: in order, sizes that differ by one at most, maybe empty."""
    replicas = replica_count(strategy)
    leaves = tree.flatten(batch)
    parts = [_parts(leaf, replicas) for leaf in leaves]

    def part_of(index: int) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.convert_to_tensor(
                parts[index][context.replica_id_in_sync_group]
            )
        )

    values = [None if leaf is None else part_of(index) for index, leaf in enumerate(leaves)]
    return tree.pack_sequence_as(batch, values)


def _parts(leaf: Any, replicas: int) -> list[Any]:
    if leaf is None:
        return []
    size, rest = divmod(int(leaf.shape[0]), replicas)
    ends = np.cumsum([size + (index < rest) for index in range(replicas)])
    return [leaf[start:end] for start, end in zip([0, *ends], ends, strict=False)]
