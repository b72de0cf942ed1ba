"""Builds a model from the shapes that the dataset declares, not from a batch of it.

Keras takes the first batch from the iterator and reduces it by MEAN over the replicas. That fails
for strings, for parts of unequal sizes and on several workers, and a generator's batch is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src import tree
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

from syncbn.errors import InputError
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import replica_count

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras reduces a batch of data in order to build."""
    return source_probe(
        "keras.src.backend.tensorflow.trainer.TensorFlowTrainer._maybe_symbolic_build",
        broken='self.distribute_strategy.reduce("MEAN", maybe_distributed_data_batch,',
        mended="element_spec",
    )


def patches() -> list[Patch]:
    """`_maybe_symbolic_build` of the trainer."""
    return [Patch(TensorFlowTrainer, "_maybe_symbolic_build", _builder)]


def _builder(original: Callable[..., None]) -> Callable[..., None]:
    def _maybe_symbolic_build(model: Any, iterator: Any = None, data_batch: Any = None) -> None:
        strategy = model._distribute_strategy
        if strategy is None or replica_count(strategy) == 1 or iterator is None:
            return original(model, iterator=iterator, data_batch=data_batch)
        if type(model).call is keras.Model.call:
            # Only its `train_step` knows what it does, as in a model of two adversaries.
            return None
        batch = symbolic_batch(iterator._distributed_dataset.element_spec)
        with strategy.scope():
            model._symbolic_build(data_batch=batch)
        return None

    return _maybe_symbolic_build


def symbolic_batch(element_spec: Any) -> Any:
    """One replica's part of a batch as symbolic tensors.

    Raises:
        InputError: the dataset does not declare how many axes its tensors have.
    """

    def to_symbolic(spec: Any) -> Any:
        if hasattr(spec, "_value_specs"):  # one for each replica of this worker
            spec = spec._value_specs[0]
        if not hasattr(spec, "shape") or isinstance(spec, tf.OptionalSpec):
            return None  # how tf.data says "no sample weights"
        if spec.shape.rank is None:
            raise InputError(
                "Building a model on replicas requires a dataset that declares the number of axes "
                f"of its tensors. Received: {spec}. Call set_shape() in the dataset's last map, "
                "or give from_generator an output_signature with shapes."
            )
        return keras.KerasTensor(tuple(spec.shape), keras.backend.standardize_dtype(spec.dtype))

    return tree.map_structure(to_symbolic, element_spec)
