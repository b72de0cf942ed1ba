"""Which arguments go from one class to the other, and which can be set on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from syncbn._keras import knows_renorm
from syncbn.errors import InputError
from syncbn.layer import SyncBatchNormalization

__all__ = [
    "TO_PLAIN",
    "TO_SYNCHRONIZED",
    "Direction",
    "arguments_of",
    "checked_overrides",
    "lost_arguments",
]

# What both classes take, but for `renorm`, which Keras's has since 3.13, and `momentum`.
_SHARED = (
    "axis",
    "epsilon",
    "center",
    "scale",
    "beta_initializer",
    "gamma_initializer",
    "moving_mean_initializer",
    "moving_variance_initializer",
    "beta_regularizer",
    "gamma_regularizer",
    "beta_constraint",
    "gamma_constraint",
    "name",
    "trainable",
)
_RENORM = ("renorm", "renorm_clipping", "renorm_momentum")

# Ours alone, with the value that does nothing.
_OWN = {
    "group_size": None,
    "group_assignment": None,
    "virtual_batch_size": None,
    "unbiased_moving_variance": False,
    "nan_check": False,
    "save": "input",
    "axis_name": None,
    "process_group": None,
}


class Direction(NamedTuple):
    """From one class to the other."""

    old_class: type
    new_class: type
    settable: tuple[str, ...]  # arguments of the new class that change neither weights nor outputs

    @property
    def synchronizes(self) -> bool:
        """Whether layers become synchronized."""
        return self.new_class is SyncBatchNormalization

    def is_of_old_kind(self, layer: Any) -> bool:
        """Whether a batch normalization is one that this direction is about, if only by descent."""
        return isinstance(layer, SyncBatchNormalization) != self.synchronizes

    def is_of_new_kind(self, layer: Any) -> bool:
        """Whether it is one as this direction makes them, if only by descent."""
        is_any = isinstance(layer, keras.layers.BatchNormalization)
        return is_any and not self.is_of_old_kind(layer)


TO_SYNCHRONIZED = Direction(
    keras.layers.BatchNormalization, SyncBatchNormalization, ("momentum", "epsilon", *_OWN)
)
TO_PLAIN = Direction(
    SyncBatchNormalization,
    keras.layers.BatchNormalization,
    ("momentum", "epsilon", "synchronized"),
)


def checked_overrides(direction: Direction, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments to set on every new layer, if they can be.

    Raises:
        InputError: one is not of the new class, or would change the weights or the outputs.
    """
    name = direction.new_class.__name__
    wrong = [argument for argument in overrides if argument not in direction.settable]
    if wrong:
        raise InputError(
            f"Conversion to {name} sets the arguments {', '.join(direction.settable)}. Received: "
            f"{', '.join(f'{argument}={overrides[argument]!r}' for argument in wrong)}. Leave it "
            "out: all others stay what they are in each layer."
        )
    if "momentum" in overrides and overrides["momentum"] is None:
        raise InputError(
            "Conversion requires a number as momentum. Received: momentum=None, which needs a "
            "weight that the layers do not have. Make the model with such layers, and copy weights."
        )
    direction.new_class(**overrides)  # it says itself what cannot be
    return dict(overrides)


def arguments_of(
    layer: Any, direction: Direction, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The new layer's arguments, and what stands against it, if anything does."""
    arguments = {name: getattr(layer, name) for name in _SHARED}
    arguments["dtype"] = layer.dtype_policy
    arguments["momentum"] = overrides.get("momentum", layer.momentum)
    if knows_renorm() or direction.synchronizes:
        arguments |= {name: getattr(layer, name) for name in _RENORM if hasattr(layer, name)}
    if direction.synchronizes:
        arguments["autocast"] = layer.autocast
        return {**arguments, **overrides}, ""
    arguments["autocast"] = layer._casts_inputs
    if arguments["momentum"] is None:
        arguments["momentum"] = TO_PLAIN.new_class().momentum
    return {**arguments, **overrides}, _against_plain(layer)


def _against_plain(layer: Any) -> str:
    """Why a synchronized layer cannot become Keras's, empty if it can."""
    if layer.activation is not None:
        return f"activation={layer.activation.__name__!r} inside, which Keras's layer does not have"
    if layer.renorm and not knows_renorm():
        return f"renorm, which Keras {keras.__version__} does not have"
    for node in layer._inbound_nodes:
        if node.arguments.kwargs.get("weights") is not None:
            return "called with weights=, which Keras's layer does not take"
    return ""


def lost_arguments(
    layer: Any, direction: Direction, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """What the layer was made with, and the new one does not do."""
    if direction.synchronizes:
        return {}
    lost = {name: getattr(layer, name) for name in _OWN if getattr(layer, name) != _OWN[name]}
    if layer.momentum is None and "momentum" not in overrides:
        lost["momentum"] = None
    return lost
