"""Says once, and by name, which layers of a model are not synchronized.

It is widely believed that BatchNormalization under a strategy is. Nothing is changed here: what
each replica normalizes by is in the layer. See `syncbn.SyncBatchNormalization`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

from syncbn.multi_worker.moving_statistics import local_layers
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import replica_count

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether `synchronized` has to be asked for."""
    return source_probe(
        "keras.src.layers.normalization.batch_normalization.BatchNormalization.__init__",
        broken="synchronized=False",
        mended="synchronized=True",
    )


def patches() -> list[Patch]:
    """What prepares training."""
    return [Patch(TensorFlowTrainer, "make_train_function", _warning)]


def _warning(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_train_function(model: Any, force: bool = False) -> Any:
        replicas = replica_count(model.distribute_strategy)
        if replicas > 1:
            names = [layer.name for layer in local_layers(model) if layer.trainable]
            if names and getattr(model, "_warned_of_local_statistics", None) != names:
                # Noted past Keras's own __setattr__, which would track the list.
                vars(model)["_warned_of_local_statistics"] = names
                warnings.warn(_message(names, replicas), stacklevel=3)
        return original(model, force)

    return make_train_function


def _message(names: list[str], replicas: int) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"BatchNormalization ({shown}) normalizes each of {replicas} replicas by its own "
        "statistics, and what is saved are those of the first. Use syncbn.SyncBatchNormalization "
        "to train as one device does, or syncbn.average_moving_statistics(model) after training."
    )
