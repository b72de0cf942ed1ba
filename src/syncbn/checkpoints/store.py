"""The format of Keras 2.12 and later: `.keras`, and the `.weights.h5` that lies in it or alone."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py

from syncbn.checkpoints.configs import Described, described, layers_in
from syncbn.checkpoints.hdf5 import array_of, child, count
from syncbn.checkpoints.saved import Saved, SavedLayer, base_and_number, snake_case
from syncbn.errors import InputError

__all__ = ["read_keras", "read_store"]

# What a compiled model has beside its layers; and generators of random numbers.
_NOT_OF_THE_MODEL = frozenset({"optimizer", "metrics", "loss", "compiled_loss", "compiled_metrics"})
_GENERATORS = frozenset({"seed_generator", "random_generator", "_random_generator"})

_WEIGHTS = "model.weights.h5"
_OLD_LAYERS = "_layer_checkpoint_dependencies"  # as 2.12 to 2.14 call `layers`


def read_keras(path: Path) -> Saved:
    """A `.keras` archive: its weights, and from its configuration names and classes alone.

    Raises:
        InputError: an archive without HDF5 weights.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if _WEIGHTS not in names:
            raise InputError(
                f"load_weights requires a .keras file with {_WEIGHTS} in it. Received: {path} with "
                f"{names[:5]}. Save the model anew; weights as .npz are pickles, which are not "
                "loaded."
            )
        config = json.loads(archive.read("config.json")) if "config.json" in names else {}
        metadata = json.loads(archive.read("metadata.json")) if "metadata.json" in names else {}
        weights = io.BytesIO(archive.read(_WEIGHTS))
    with h5py.File(weights, "r") as file:
        saved = read_store(file, config)
    return saved._replace(
        format=".keras",
        keras_version=str(metadata["keras_version"]) if "keras_version" in metadata else None,
    )


def read_store(file: Any, config: Mapping[str, Any] | None = None) -> Saved:
    """The layers of a tree of groups, each with its weights by number in `vars`."""
    layers: list[SavedLayer] = []
    left: dict[str, int] = {}
    for path, group in _groups(file, ()):
        if path[:1] and path[0].lstrip("_") in _NOT_OF_THE_MODEL:
            left[path[0]] = left.get(path[0], 0) + count(group)
        elif any(base_and_number(part)[0] in _GENERATORS for part in path):
            left["/".join(path)] = count(group)
        else:
            arrays = {name: array_of(group, name) for name in sorted(group, key=_number)}
            address = tuple("layers" if part == _OLD_LAYERS else part for part in path)
            layers.append(SavedLayer("/".join(path) or "vars", arrays, address=address))
    known = described(config) if config else Described(())
    layers = list(_with_config(layers, config or {}))
    return Saved(
        ".weights.h5",
        tuple(layers),
        ordered=bool(layers) and all(layer.config is not None for layer in layers),
        left_out=tuple(f"{name}: {number} arrays" for name, number in left.items()),
        has_config=bool(known),
        classes=known.normalizations(),
    )


def _groups(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name in group:
        below = child(group, name)
        if isinstance(below, h5py.Dataset):
            continue
        if name == "vars" and all(isinstance(child(below, one), h5py.Dataset) for one in below):
            if len(below):
                yield path, below
        else:
            yield from _groups(below, (*path, name))


def _number(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (-1, name)


def _with_config(layers: list[SavedLayer], config: Mapping[str, Any]) -> Iterator[SavedLayer]:
    """The layers in the order of the configuration, with its names; first those it says not.

    Only where a functional or sequential model lists as many layers of a class as the file has:
    the names in the file are numbers of layers of a class, and those without weights may miss.
    """
    by_address = {layer.address: layer for layer in layers}
    named: dict[tuple[str, ...], SavedLayer] = {}
    for address, described_layer in _addresses_of(config, (), [a for a in by_address if a]):
        layer = by_address.get(address)
        if layer is not None:
            own = described_layer["config"]
            named[address] = layer._replace(
                name=str(own.get("name", described_layer.get("name"))),
                class_name=str(described_layer["class_name"]),
                config=own,
            )
    for place, layer in by_address.items():
        if place not in named:
            # The name of a group is that of its class only in a list of layers.
            listed = place is not None and place[-2:-1] == ("layers",)
            kind = base_and_number(place[-1])[0] if place and listed else None
            yield layer._replace(class_name=kind)
    yield from named.values()


def _addresses_of(
    model: Mapping[str, Any], prefix: tuple[str, ...], addresses: list[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Where each layer of a configuration lies in the file."""
    here = (*prefix, "layers")
    groups: dict[str, list[str]] = {}
    for group in {a[len(here)] for a in addresses if a[: len(here)] == here and len(a) > len(here)}:
        groups.setdefault(base_and_number(group)[0], []).append(group)
    listed: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers_in(model):
        listed.setdefault(snake_case(str(layer.get("class_name"))), []).append(layer)
    where: dict[int, tuple[str, ...]] = {}
    for kind, names in groups.items():
        if len(listed.get(kind, ())) == len(names):
            names.sort(key=lambda name: base_and_number(name)[1])
            for layer, name in zip(listed[kind], names, strict=True):
                where[id(layer)] = (*here, name)
    for layer in layers_in(model):
        if id(layer) in where and isinstance(layer.get("config"), Mapping):
            yield where[id(layer)], layer
            yield from _addresses_of(layer, where[id(layer)], addresses)
