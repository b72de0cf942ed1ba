"""Arguments of the layer that Keras's batch normalization does not have, checked."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from syncbn import _backends
from syncbn.errors import InputError
from syncbn.groups import is_positive_integer

__all__ = [
    "activation_function",
    "checked_axis_name",
    "checked_renorm_momentum",
    "checked_save",
    "checked_virtual_batch_size",
    "negative_slope",
    "refuse_synchronized",
    "saved_process_group",
]


def refuse_synchronized(arguments: Mapping[str, Any]) -> None:
    """Raise a TypeError for the one argument of Keras's layer that makes no sense here."""
    if "synchronized" in arguments:
        raise TypeError(
            "SyncBatchNormalization takes the arguments of keras.layers.BatchNormalization "
            f"but `synchronized`. Received: synchronized={arguments['synchronized']!r}. Remove "
            "it: this layer always synchronizes."
        )


def checked_virtual_batch_size(size: Any, **others: Any) -> int | None:
    """The size as an integer, if it is one and none of the others is given."""
    if size is None:
        return None
    if not is_positive_integer(size):
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


def checked_axis_name(name: Any) -> str | tuple[str, ...] | None:
    """The name or names of JAX's mapped axes, if they are names, each once."""
    if name is None or (isinstance(name, str) and name):
        return name
    names = tuple(name) if isinstance(name, Sequence) and not isinstance(name, str) else ()
    if not names or not all(isinstance(n, str) and n for n in names) or len({*names}) < len(names):
        raise InputError(
            "axis_name requires the name of a mapped axis, or several names, each once. "
            f"Received: axis_name={name!r}. Give the name that shard_map, pmap or vmap maps."
        )
    return names


def saved_process_group(group: Any) -> list[int]:
    """The ranks of a process group, all of it that a file can hold; of such a list itself."""
    if isinstance(group, Sequence):
        return list(group)
    ranks: list[int] = _backends.get("torch").ranks_of(group)
    return ranks


def activation_function(activation: Any, activations: Any = keras.activations) -> Any:
    """Keras's function of that name, None for the identity.

    Only Keras's own: the backward computes it again, and of one that draws random numbers or reads
    variables it would be another.

    Args:
        activation: its name, or the function itself.
        activations: all that there are, by name.
    """
    if activation in (None, "linear", "identity"):
        return None
    name = getattr(activation, "__name__", activation)
    function = getattr(activations, name, None) if isinstance(name, str) else None
    if function is None or name in _NO_ACTIVATIONS or activation not in (name, function):
        raise InputError(
            "activation requires the name of an activation of Keras, as 'relu', or None. "
            f"Received: activation={activation!r}. Put anything else behind this layer, as a layer "
            "of its own."
        )
    return None if function is activations.linear else function


# Of keras.activations: functions about activations, one that changes the shape, one that needs more
# than its argument.
_NO_ACTIVATIONS = frozenset({"deserialize", "get", "serialize", "glu", "threshold"})


def checked_save(save: Any, activation: Any, virtual_batch_size: Any, grouped_renorm: bool) -> str:
    """What the backward keeps, "input" or "output", if the others allow it.

    Args:
        save: the argument.
        activation: Keras's function, or None.
        virtual_batch_size: the argument.
        grouped_renorm: whether there are both groups and renormalization.
    """
    if save not in ("input", "output"):
        raise InputError(
            'save requires "input" or "output", what the backward is to keep. '
            f"Received: save={save!r}. Leave it out for the input."
        )
    if save == "input":
        return "input"
    if activation is not None and activation.__name__ != "leaky_relu":
        raise InputError(
            'save="output" requires an activation whose result gives back its argument with all '
            f'digits: "leaky_relu" or None. Received: activation={activation.__name__!r}. Where it '
            "is flat the output does not tell what the backward needs: relu gives 0 for half of "
            "all inputs, elu nearly -1 for everything below -10. Take leaky_relu, or "
            'save="input", or put the activation behind this layer, as a layer of its own.'
        )
    if virtual_batch_size is not None:
        raise InputError(
            'save="output" requires one normalization of the whole batch. Received: '
            f"virtual_batch_size={virtual_batch_size}. Remove one of the two."
        )
    if grouped_renorm:
        raise InputError(
            'save="output" requires the same gamma and beta on every replica. Received: '
            "renorm=True with groups, of which each corrects them by a batch of its own. Remove "
            "one of the three."
        )
    return "output"


def negative_slope(activation: Any) -> float:
    """The slope below 0 of an activation that `checked_save` allows."""
    if activation is None:
        return 1.0
    (slope,) = list(inspect.signature(activation).parameters.values())[1:2]
    return float(slope.default)


def checked_renorm_momentum(momentum: Any) -> Any:
    """The momentum of renormalization, if it is a number."""
    if not isinstance(momentum, numbers.Real):
        raise InputError(
            f"renorm_momentum requires a number. Received: renorm_momentum={momentum!r}. "
            "Give one from 0 to 1; None is for momentum alone."
        )
    return momentum
