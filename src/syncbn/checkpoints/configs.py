"""What a saved model's configuration tells of its layers; nothing of it is ever made or run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from syncbn.checkpoints.saved import is_normalization

__all__ = ["Described", "described", "layers_in"]


class Described(NamedTuple):
    """The layers of a configuration, in its order: name, class, configuration."""

    layers: tuple[tuple[str, str, Mapping[str, Any]], ...]

    def __bool__(self) -> bool:
        return bool(self.layers)

    def layer(self, name: str) -> tuple[str, Mapping[str, Any]] | None:
        """Class and configuration of the layer of this name, if there is one alone."""
        found = [(kind, config) for own, kind, config in self.layers if own == name]
        return found[0] if len(found) == 1 else None

    def normalizations(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """All batch normalizations, of both classes."""
        return tuple((kind, config) for _, kind, config in self.layers if is_normalization(kind))


def described(model: Mapping[str, Any]) -> Described:
    """All layers of a model's configuration, those of models and wrappers in it too."""
    return Described(tuple(_walk(model)))


def _walk(layer: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    if not isinstance(layer, Mapping) or not isinstance(layer.get("config"), Mapping):
        return
    config = layer["config"]
    yield str(config.get("name", layer.get("name", ""))), str(layer.get("class_name")), config
    for inner in layers_in(layer):
        yield from _walk(inner)
    for name, value in config.items():
        if name != "layers":
            yield from _walk(value)


def layers_in(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The layers that a model's configuration lists; none of a layer's or a subclassed model's."""
    config = model.get("config")
    layers = config.get("layers") if isinstance(config, Mapping) else config
    return [one for one in layers if isinstance(one, Mapping)] if isinstance(layers, list) else []
