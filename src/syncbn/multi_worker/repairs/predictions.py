"""`predict_on_batch` splits its batch, and what cannot be joined is refused.

Keras gives every replica the whole batch, so that each prediction comes several times. A model
that returns one number a batch gets as many as there are replicas, or an error of a gather.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras.src import tree
from keras.src.backend.tensorflow import trainer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

from syncbn.errors import UnsupportedFeatureError
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import replica_count
from syncbn.multi_worker.splitting import split

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras hands the batch on as it is."""
    return source_probe(
        "keras.src.backend.tensorflow.trainer.TensorFlowTrainer.predict_on_batch",
        broken="batch_outputs = self.predict_function([(x,)])",
        mended="experimental_distribute_values_from_function",
    )


def patches() -> list[Patch]:
    """What goes in, and how it is joined."""
    return [
        Patch(TensorFlowTrainer, "predict_on_batch", _predictor),
        Patch(trainer, "reduce_per_replica", _joiner),
    ]


def _predictor(original: Callable[..., Any]) -> Callable[..., Any]:
    def predict_on_batch(model: Any, x: Any) -> Any:
        strategy = model.distribute_strategy
        return original(model, split(strategy, x) if replica_count(strategy) > 1 else x)

    return predict_on_batch


def _joiner(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
        if reduction == "concat" and replica_count(strategy) > 1:
            for value in tree.flatten(values):
                local = strategy.experimental_local_results(value)[0]
                if local is not None and local.shape.rank == 0:
                    raise UnsupportedFeatureError(
                        f"predict on {replica_count(strategy)} replicas requires outputs with an "
                        "axis of examples, along which their parts are joined. Received: one "
                        f"number a batch ({value}). Return one value an example, or predict "
                        "outside of the strategy."
                    )
        return original(values, strategy, reduction)

    return reduce_per_replica
