"""`add_loss` and activity regularizers: a list of losses for each replica.

The replicas run in threads that take turns at every collective, and share the layers: what one
replica has added another one clears, or adds to its own loss.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras.src.layers.layer import Layer

from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import in_replica

__all__ = ["is_needed", "patches"]

_OF_REPLICAS = "_losses_of_replicas"


def is_needed() -> bool:
    """Whether a layer has one list for all replicas."""
    return source_probe(
        "keras.src.layers.layer.Layer.__init__",
        broken="self._losses = []",
        mended="self._losses_of_replicas",
    )


def patches() -> list[Patch]:
    """The attribute `_losses`, made a property of the class: layers that exist have it too."""
    return [Patch(Layer, "_losses", lambda _: _LossesOfThisReplica())]


class _LossesOfThisReplica:
    """Reads and writes the list of the replica that asks; outside of replicas the layer's own.

    A data descriptor comes before what is in the instance, so that a layer's own list stays where
    it was and is found again after undoing.
    """

    def __get__(self, layer: Any, _: type | None = None) -> Any:
        if layer is None:
            return self
        own = vars(layer)
        if not in_replica():
            try:
                return own["_losses"]
            except KeyError:
                raise AttributeError("_losses") from None
        lists = own.setdefault(_OF_REPLICAS, {})
        return lists.setdefault(_replica(), [])

    def __set__(self, layer: Any, losses: list[Any]) -> None:
        if in_replica():
            vars(layer).setdefault(_OF_REPLICAS, {})[_replica()] = losses
            # A layer that a replica has made, as an unbuilt model does, needs one of its own, too.
            vars(layer).setdefault("_losses", [])
        else:
            vars(layer)["_losses"] = losses


def _replica() -> int:
    """The replica's number on this worker: known while its function is traced."""
    return int(tf.distribute.get_replica_context()._replica_id)
