"""The layers of a model that have weights of their own, as a checkpoint is matched with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from syncbn.checkpoints.saved import leaf_name, snake_case
from syncbn.errors import InputError

__all__ = ["OPTIONAL", "Slot", "is_batch_normalization", "slots_of"]

# Weights that no old layer has: a file without them leaves them as they are.
OPTIONAL = frozenset({"num_batches_tracked"})


class Slot(NamedTuple):
    """A layer and the weights that are its own, not its sublayers', in Keras's order."""

    layer: Any
    path: str
    """The names of the layers it lies in and its own: `backbone/block/bn`."""
    variables: dict[str, Any]

    @property
    def name(self) -> str:
        """The layer's name."""
        return str(self.layer.name)

    @property
    def base(self) -> str:
        """Its class as Keras writes it in names."""
        return snake_case(type(self.layer).__name__)


def is_batch_normalization(layer: Any) -> bool:
    """Whether it is a batch normalization of any class, synchronized or not."""
    return isinstance(layer, keras.layers.BatchNormalization)


def slots_of(model: Any) -> tuple[Slot, ...]:
    """All of them, in the order in which Keras 2 wrote a model's weights into HDF5.

    That is layer by layer of `model.layers`, in each the trainable weights before the others; last
    the model's own.

    Raises:
        InputError: no model, or one that is not built.
    """
    if not isinstance(model, keras.Model):
        raise InputError(
            f"load_weights requires a Keras 3 model. Received: {type(model)}. Give the model that "
            "the weights are for, made anew."
        )
    owners = {id(v): slot for slot in _all_slots(model) for v in slot.variables.values()}
    # By `add_weight` before its values exist, or a layer whose `build` still is to come.
    unbuilt = [layer.name for layer in model._flatten_layers() if not layer.built]
    if unbuilt or not owners:
        raise InputError(
            f"load_weights requires a built model with weights. Received: {model.name!r}, in which "
            f"these are not built: {unbuilt[:5]}{' …' if len(unbuilt) > 5 else ''}. Call it once "
            "on a batch, or build it."
        )
    ordered: dict[int, Slot] = {}
    for part in [*model.layers, model]:
        for variable in [*part.trainable_weights, *part.non_trainable_weights]:
            slot = owners.get(id(variable))
            if slot is not None:
                ordered.setdefault(id(slot.layer), slot)
    return tuple(ordered.values())


def _all_slots(model: Any) -> Iterator[Slot]:
    seen: set[int] = set()
    # Children before a model's own weights, each with the names of what it lies in.
    stack = [(model, "")]
    while stack:
        layer, path = stack.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        if own:
            yield Slot(layer, path or layer.name, {leaf_name(v.name): v for v in own})
        for child in layer._flatten_layers(include_self=False, recursive=False):
            stack.append((child, f"{path}/{child.name}" if path else child.name))
