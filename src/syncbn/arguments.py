"""Arguments of the layer that Keras's batch normalization does not have, checked."""

from __future__ import annotations

from typing import Any

import keras

from syncbn.errors import InputError

__all__ = ["activation_function", "checked_virtual_batch_size"]


def checked_virtual_batch_size(size: Any, **others: Any) -> int | None:
    """The size as an integer, if it is one and none of the others is given."""
    if size is None:
        return None
    if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
        raise InputError(
            "virtual_batch_size requires a number of examples, an integer of at least 1. "
            f"Received: virtual_batch_size={size!r}. Leave it out for the whole batch."
        )
    given = {name: value for name, value in others.items() if value is not None}
    if given:
        raise InputError(
            "virtual_batch_size normalizes parts of a replica's batch by themselves, and requires "
            f"that it is alone. Received: virtual_batch_size={size} with {given!r}. Remove one."
        )
    return int(size)


def activation_function(activation: Any) -> Any:
    """Keras's function of that name, None for the identity."""
    if isinstance(activation, keras.layers.Layer):
        raise InputError(
            "activation requires the name of an activation of Keras, as 'relu', or its function. "
            f"Received: the layer {activation.name!r}. Put it behind this layer."
        )
    function = keras.activations.get(activation)
    return None if function is keras.activations.linear else function
