"""What a conversion would do, layer by layer, before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import keras

from syncbn.conversion.arguments import (
    Direction,
    arguments_of,
    checked_overrides,
    lost_arguments,
)
from syncbn.errors import InputError

__all__ = ["ConversionPlan", "Custom", "Left", "Replacement", "plan"]

Custom = Callable[[Any], Any]


class Replacement(NamedTuple):
    """A layer that becomes another."""

    path: str  # names from the model's layers down to it, by slashes
    old_class: str
    new_class: str
    arguments: Mapping[str, Any]  # set on the new layer beyond what it has from the old one
    lost: Mapping[str, Any]  # the old one's arguments that the new class does not have
    layer: Any  # the layer itself
    made: Any  # of the new class, not built: where the arguments come from


class Left(NamedTuple):
    """A batch normalization that stays as it is."""

    path: str
    old_class: str
    reason: str
    stops: bool  # whether the conversion is refused because of it
    layer: Any


class ConversionPlan(NamedTuple):
    """What `convert` or `revert` would do with a model, as data.

    `str()` gives the line that they say when they are done.

    Attributes:
        model: its name.
        goal: the class that layers become.
        replaced: the layers that become it, each a `Replacement`.
        left: the batch normalizations that stay, each a `Left` with its reason.
    """

    model: str  # its name
    goal: str  # the class that layers become
    replaced: tuple[Replacement, ...]
    left: tuple[Left, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan in numbers, strings, lists and dictionaries, as for JSON."""
        return {
            "model": self.model,
            "goal": self.goal,
            "replaced": [
                {
                    "path": one.path,
                    "old_class": one.old_class,
                    "new_class": one.new_class,
                    "arguments": {name: _plain(value) for name, value in one.arguments.items()},
                    "lost": {name: _plain(value) for name, value in one.lost.items()},
                }
                for one in self.replaced
            ],
            "left": [
                {"path": one.path, "old_class": one.old_class, "reason": one.reason}
                for one in self.left
            ],
        }

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return f"{self.model}: there is no layer to become {self.goal}."
        said = f"{self.model}: {_layers(len(self.replaced))} -> {self.goal}"
        lost = sorted({name for one in self.replaced for name in one.lost})
        if lost:
            said += f", without their {', '.join(lost)}"
        if self.left:
            first = self.left[0]
            said += f"; {len(self.left)} left as they are, as {first.path} ({first.reason})"
        return f"{said}."


def _layers(number: int) -> str:
    return f"{number} layer{'' if number == 1 else 's'}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def plan(
    model: Any, direction: Direction, custom: Custom | None, overrides: Mapping[str, Any]
) -> ConversionPlan:
    """Every batch normalization of the model, and what is to become of it.

    Raises:
        InputError: no model; an argument that cannot be set; a `custom` that gives no such layer.
    """
    _check_model(model)
    overrides = checked_overrides(direction, overrides)
    replaced: list[Replacement] = []
    left: list[Left] = []
    for path, layer in batch_normalizations(model):
        if type(layer) is direction.new_class:
            continue
        found = _planned(path, layer, direction, custom, overrides)
        if isinstance(found, Replacement):
            replaced.append(found)
        elif found is not None:
            left.append(found)
    return ConversionPlan(model.name, direction.new_class.__name__, tuple(replaced), tuple(left))


def _check_model(model: Any) -> None:
    if isinstance(model, keras.layers.Layer):
        return
    remedy = "Give the model itself."
    if any(base.__module__.startswith("tf_keras") for base in type(model).__mro__):
        remedy = "For models of tf_keras there is the layer syncbn.tf_keras.SyncBatchNormalization."
    raise InputError(
        "Conversion requires a model or a layer of Keras 3. Received: "
        f"{type(model).__module__}.{type(model).__qualname__}. {remedy}"
    )


def batch_normalizations(model: Any) -> Iterator[tuple[str, Any]]:
    """Every batch normalization that Keras knows to be in the model, once, with its path."""
    seen: set[int] = set()

    def visit(layer: Any, path: str) -> Iterator[tuple[str, Any]]:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        if isinstance(layer, keras.layers.BatchNormalization):
            yield path, layer
        for inner in layer._layers:
            # Keras keeps a Sequential's layers twice, once in a model of its own without a place.
            name = inner.name if path == "" else f"{path}/{inner.name}"
            yield from visit(inner, name)

    for path, layer in visit(model, ""):
        yield path or layer.name, layer


def _planned(
    path: str,
    layer: Any,
    direction: Direction,
    custom: Custom | None,
    overrides: Mapping[str, Any],
) -> Replacement | Left | None:
    """What becomes of one layer; None for one of the goal's own kind."""
    old_class = type(layer).__name__

    def left(reason: str, stops: bool = False) -> Left:
        return Left(path, old_class, reason, stops, layer)

    if type(layer) is direction.old_class:
        arguments, stopping = arguments_of(layer, direction, overrides)
        if stopping:
            return left(stopping, stops=True)
        made = direction.new_class(**arguments)
        lost = lost_arguments(layer, direction, overrides)
        return Replacement(path, old_class, type(made).__name__, overrides, lost, layer, made)
    if not direction.is_of_old_kind(layer):
        return None
    made = None if custom is None else custom(layer)
    if made is None:
        return left(f"{old_class} is a class of its own")
    _check_custom(made, layer, direction)
    return Replacement(path, old_class, type(made).__name__, {}, {}, layer, made)


def _check_custom(made: Any, layer: Any, direction: Direction) -> None:
    """Make sure that a user's function gave a new layer that can take over this one's weights."""
    wanted = direction.new_class.__name__
    found = None
    if not direction.is_of_new_kind(made):
        found = f"{type(made).__name__}"
    elif made is layer or made.built:
        found = "a layer that is built already"
    else:
        different = [
            f"{name}={getattr(made, name)!r} instead of {getattr(layer, name)!r}"
            for name in ("axis", "scale", "center", "renorm")
            if getattr(made, name, False) != getattr(layer, name, False)
        ]
        found = ", ".join(different)
    if found:
        raise InputError(
            f"`custom` requires to return a new {wanted} with weights as those of the layer that "
            f"it is given, or None to leave that. Received: {found}, for the layer {layer.name!r} "
            f"of class {type(layer).__name__}. Make one with the arguments of the layer."
        )
