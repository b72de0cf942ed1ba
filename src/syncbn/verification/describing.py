"""What a report says of a layer, and what its formula needs."""

from __future__ import annotations

from typing import Any

import keras

from syncbn.layer import SyncBatchNormalization
from syncbn.verification.recording import LayerCall

__all__ = ["described", "draws"]


def described(key: str, layer: Any) -> LayerCall:
    """The call of a layer, without the layer: reports outlive models, and travel."""
    return LayerCall(
        key=key,
        class_name=_class_name(type(layer)),
        dtype=str(layer.compute_dtype),
        random=draws(layer),
        normalization=_normalization(layer),
    )


def _class_name(its_class: type) -> str:
    package = its_class.__module__.split(".")[0]
    own = package in {"keras", "syncbn"}
    return f"{package}.{its_class.__name__}" if own else its_class.__name__


def draws(layer: Any) -> bool:
    """Whether it holds a generator of random numbers."""
    return any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())


def _normalization(layer: Any) -> dict[str, Any] | None:
    """Of Keras's and our batch normalization; None where the formula is another, or unknown."""
    if not isinstance(layer, keras.layers.BatchNormalization):
        return None
    ours = isinstance(layer, SyncBatchNormalization)
    base = SyncBatchNormalization if ours else keras.layers.BatchNormalization
    if type(layer).call is not base.call or getattr(layer, "renorm", False):
        return None
    if getattr(layer, "virtual_batch_size", None) is not None:
        return None
    activation = getattr(layer, "activation", None)
    return {
        "axis": int(layer.axis),
        "epsilon": float(layer.epsilon),
        "activation": None if activation is None else keras.activations.serialize(activation),
        "group_size": getattr(layer, "group_size", None),
        "group_assignment": getattr(layer, "group_assignment", None),
        "synchronized": bool(getattr(layer, "synchronized", False)),
        "ours": ours,
    }
