"""Where a format would put the layers of a model: the rules by which old Keras walked its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from syncbn.checkpoints.saved import NORMALIZATIONS, base_and_number, snake_case
from syncbn.checkpoints.slots import Slot, is_batch_normalization

__all__ = ["by_graph", "by_store"]

Address = tuple[str, ...]

_MERGED = "batch_normalization"


def by_graph(model: Any, addresses: Sequence[Address], slots: Sequence[Slot]) -> list[Slot | None]:
    """The layer at each place in TensorFlow's graph of objects, None where there is no such."""
    of_layer = {id(slot.layer): slot for slot in slots}
    found: list[Slot | None] = []
    for address in addresses:
        place = model
        for label in address:
            place = _step(place, label)
        found.append(of_layer.get(id(place)))
    return found


def _step(place: Any, label: str) -> Any:
    kind, _, number = label.rpartition("-")
    if kind in ("layer_with_weights", "layer") and number.isdigit() and hasattr(place, "layers"):
        layers = place.layers if kind == "layer" else [x for x in place.layers if x.weights]
        return layers[int(number)] if int(number) < len(layers) else None
    if isinstance(place, (list, tuple)):
        return place[int(label)] if label.isdigit() and int(label) < len(place) else None
    if isinstance(place, dict):
        return next((value for key, value in place.items() if str(key) == label), None)
    return getattr(place, label, None) if isinstance(place, keras.layers.Layer) else None


def by_store(
    model: Any, addresses: Sequence[Address], slots: Sequence[Slot]
) -> Iterator[list[Slot | None]]:
    """The layer at each place in a tree of groups, by each rule that fits all places.

    Layers in a list are named by their class and counted. The versions differ in the order of the
    attributes, and so in the path of a layer that can be reached by several, and in which layers
    count: so the numbers are taken for the order alone. In a list with batch normalizations of one
    class in the file, those of the model are taken for the same class, whatever theirs are.
    """
    for merged in (False, True):
        wanted = _renumbered(addresses, merged)
        if wanted is None:
            continue
        for order in (_of_keras_3, _falling, _rising):
            places = list(_walk(model, (), order, merged, set()))
            of_layer = {id(slot.layer): slot for slot in slots}
            kept = [(address, of_layer[id(x)]) for address, x in places if id(x) in of_layer]
            theirs = _renumbered([address for address, _ in kept], merged=False)
            assert theirs is not None
            at = dict(zip(theirs, (slot for _, slot in kept), strict=True))
            if at.keys() >= {*wanted}:
                yield [at[address] for address in wanted]


def _renumbered(addresses: Sequence[Address], merged: bool) -> list[Address] | None:
    """The same with the numbers of siblings of a name made 0, 1, 2 …; None where order is lost."""
    members: dict[Address, set[str]] = {}
    for address in addresses:
        for depth, part in enumerate(address):
            members.setdefault(address[:depth], set()).add(part)
    new: dict[Address, dict[str, str]] = {}
    for prefix, names in members.items():
        by_base: dict[str, list[tuple[int, str]]] = {}
        for name in names:
            base, number = base_and_number(name)
            by_base.setdefault(base, []).append((number, name))
        if merged and by_base.keys() >= NORMALIZATIONS:
            return None
        new[prefix] = {}
        for base, siblings in by_base.items():
            called = _MERGED if merged and base in NORMALIZATIONS else base
            for rank, (_, name) in enumerate(sorted(siblings)):
                new[prefix][name] = f"{called}#{rank}"
    return [
        tuple(new[address[:depth]][part] for depth, part in enumerate(address))
        for address in addresses
    ]


def _of_keras_3(layer: Any, names: list[str]) -> list[str]:
    first = ["layers"] if _lists_layers(layer) else []
    return first + sorted(names, key=lambda name: f"~{name}" if name.startswith("_") else name)


def _falling(layer: Any, names: list[str]) -> list[str]:
    """Of tf_keras and TensorFlow 2.15."""
    del layer
    return sorted(names, reverse=True)


def _rising(layer: Any, names: list[str]) -> list[str]:
    """Of TensorFlow 2.12 to 2.14, where a functional model's list was a private attribute."""
    if not _lists_layers(layer):
        return sorted(names)
    return sorted(names, key=lambda name: "_layer_checkpoint" if name == "layers" else name)


def _lists_layers(layer: Any) -> bool:
    return isinstance(layer, keras.Sequential) or hasattr(layer, "_input_layers")


_HIDDEN = frozenset({"_functional", "operations", "_operations", "_layers"})


def _walk(
    layer: Any,
    address: Address,
    order: Callable[[Any, list[str]], list[str]],
    merged: bool,
    seen: set[int],
) -> Iterator[tuple[Address, Any]]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield address, layer
    # Only what its own class and constructor have added can hold layers; `layers` of a model too.
    names = [n for n in dir(layer) if n not in _base_names() and not n.startswith("__")]
    names = [n for n in names if n not in _HIDDEN]
    for name in order(layer, names):
        # On torch a layer is a module, which keeps its layers apart.
        value = layer.__dict__.get(name, layer.__dict__.get("_modules", {}).get(name))
        if value is None and name in ("layers", "cell", "layer"):
            value = getattr(layer, name, None)
        if isinstance(value, keras.layers.Layer):
            yield from _walk(value, (*address, name), order, merged, seen)
        elif isinstance(value, (list, tuple, dict)):
            yield from _walk_container(value, (*address, name), order, merged, seen)


def _walk_container(
    container: Any,
    address: Address,
    order: Callable[[Any, list[str]], list[str]],
    merged: bool,
    seen: set[int],
) -> Iterator[tuple[Address, Any]]:
    counts: dict[str, int] = {}
    for member in container.values() if isinstance(container, dict) else container:
        inside = isinstance(member, (list, tuple, dict))
        if id(member) in seen or not (inside or isinstance(member, keras.layers.Layer)):
            continue
        name = "container" if inside else snake_case(type(member).__name__)
        if merged and not inside and is_batch_normalization(member):
            name = _MERGED
        number = counts[name] = counts.get(name, -1) + 1
        walk = _walk_container if inside else _walk
        yield from walk(member, (*address, f"{name}_{number}"), order, merged, seen)


def _base_names() -> frozenset[str]:
    """The attributes of every layer."""
    if not _BASE:
        _BASE.append(frozenset(dir(keras.layers.Layer())))
    return _BASE[0]


_BASE: list[frozenset[str]] = []
