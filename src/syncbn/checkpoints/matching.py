"""Which layer of a file is which layer of the model: by place, by name, and never by guess."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from syncbn.checkpoints.places import by_graph, by_store
from syncbn.checkpoints.saved import (
    NORMALIZATIONS,
    Saved,
    SavedLayer,
    base_and_number,
    is_normalization,
    snake_case,
)
from syncbn.checkpoints.slots import OPTIONAL, Slot, is_batch_normalization
from syncbn.errors import InputError

__all__ = ["Pair", "match", "pairs_by_names", "refuse"]


class Pair(NamedTuple):
    """A layer of the model and what it gets: an array for each of its weights that has one."""

    slot: Slot
    layer: SavedLayer
    arrays: dict[str, np.ndarray]


class Attempt(NamedTuple):
    """One way to pair all layers, and what does not fit in it."""

    way: str
    pairs: list[Pair]
    problems: list[str]


def match(
    model: Any, slots: Sequence[Slot], saved: Saved, names: Mapping[str, str], by: str | None
) -> list[Pair]:
    """All layers of the model, each with its own of the file.

    Two ways are tried: by place (its address in the tree of the model, or the order of the layers)
    and by name (the names' numbers stand for the order of creation, as they differ between
    programs). One that fits alone is taken, and both where they agree.

    Args:
        model: the model.
        slots: its layers with weights.
        saved: the file.
        names: of the model's layers, by name or path, those in the file, taken as they are.
        by: "place" or "name" to try that way alone.

    Raises:
        InputError: no way fits, or both do and differ.
    """
    fixed = pairs_by_names(slots, saved, names)
    taken = {id(pair.slot) for pair in fixed}
    used = {pair.layer.path for pair in fixed}
    rest = [slot for slot in slots if id(slot) not in taken]
    layers = [layer for layer in saved.layers if layer.path not in used]
    attempts = [
        attempt
        for way, ways in (("place", _by_place(model, rest, saved, layers)), ("name", None))
        if by in (None, way)
        for attempt in (ways if ways is not None else _by_name(rest, layers))
    ]
    fitting = [attempt for attempt in attempts if not attempt.problems]
    if not fitting:
        best = min(attempts, key=lambda attempt: len(attempt.problems), default=None)
        refuse(saved, _unmatched(rest, layers) if best is None else best.problems)
    first = fitting[0]
    for other in fitting[1:]:
        _refuse_ambiguity(first, other)
    return [*fixed, *first.pairs]


def refuse(saved: Saved, problems: list[str]) -> None:
    """Say what does not fit, the first of it and how much.

    Raises:
        InputError: always.
    """
    shown = "; ".join(problems[:5]) + (" …" if len(problems) > 5 else "")
    raise InputError(
        f"load_weights requires a {saved.format} whose layers are those of the model, in kind and "
        f"shape. Received: {len(problems)} that do not fit: {shown}. Nothing was loaded. Make the "
        "model as it was when it was saved, or say which is which: "
        'names={"layer of the model": "layer in the file"}.'
    )


def _refuse_ambiguity(one: Attempt, other: Attempt) -> None:
    chosen = {id(pair.slot): pair.layer.path for pair in one.pairs}
    differing = [
        f"{pair.slot.path} is {chosen[id(pair.slot)]} by {one.way}, {pair.layer.path} by "
        f"{other.way}"
        for pair in other.pairs
        if chosen[id(pair.slot)] != pair.layer.path
    ]
    if differing:
        raise InputError(
            "load_weights requires layers that can be told apart. Received: two ways that fit in "
            f"all shapes, and differ in {len(differing)} layers: {'; '.join(differing[:3])}"
            f'{" …" if len(differing) > 3 else ""}. Nothing was loaded. Choose by="{one.way}" or '
            f'by="{other.way}", or give names={{"layer of the model": "layer in the file"}}.'
        )


def pairs_by_names(slots: Sequence[Slot], saved: Saved, names: Mapping[str, str]) -> list[Pair]:
    """The pairs that the user has named.

    Raises:
        InputError: no layer of such a name, or several; or they do not fit.
    """
    pairs, problems = [], []
    for ours, theirs in names.items():
        found = [slot for slot in slots if ours in (slot.path, slot.name)]
        exact = [slot for slot in found if slot.path == ours]
        found = exact if len(exact) == 1 else found
        there = [x for x in saved.layers if x.path == theirs]
        there = there or [x for x in saved.layers if x.name == theirs]
        if len(found) != 1 or len(there) != 1:
            problems.append(
                f"{ours!r} is {len(found)} layers of the model, {theirs!r} {len(there)} in the file"
            )
            continue
        problems += _misfits(found[0], there[0], kinds=False)
        pairs.append(Pair(found[0], there[0], _assigned(found[0], there[0]) or {}))
    if problems:
        refuse(saved, problems)
    return pairs


def _by_place(
    model: Any, slots: list[Slot], saved: Saved, layers: list[SavedLayer]
) -> Iterator[Attempt]:
    addresses = [layer.address for layer in layers]
    if None not in addresses:
        known = [address for address in addresses if address is not None]
        if saved.format.startswith("TensorFlow"):
            yield _attempt("place", slots, layers, by_graph(model, known, slots))
        else:
            for found in by_store(model, known, slots):
                yield _attempt("place", slots, layers, found)
    if saved.ordered and len(layers) == len(slots):
        yield _attempt("place", slots, layers, list(slots))


def _by_name(slots: list[Slot], layers: list[SavedLayer]) -> Iterator[Attempt]:
    """By names without their numbers, and by the order of the numbers where there are several."""
    if any(layer.name is None for layer in layers):
        return
    for merged in (False, True):
        theirs = _by_base([str(layer.name) for layer in layers], merged)
        ours = _by_base([slot.name for slot in slots], merged)
        if theirs is None or ours is None:
            continue
        if {base: len(x) for base, x in theirs.items()} == {b: len(x) for b, x in ours.items()}:
            found: list[Slot | None] = [None] * len(layers)
            for base, numbers in theirs.items():
                for there, here in zip(numbers, ours[base], strict=True):
                    found[there] = slots[here]
            yield _attempt("name", slots, layers, found)


def _by_base(names: list[str], merged: bool) -> dict[str, list[int]] | None:
    """For each name without its number which have it, in the order of the numbers."""
    groups: dict[str, list[tuple[int, int]]] = {}
    bases = {base_and_number(name)[0] for name in names}
    if merged and bases >= NORMALIZATIONS:
        return None  # the order of creation of the two together is not known
    for index, name in enumerate(names):
        base, number = base_and_number(name)
        base = "batch_normalization" if merged and base in NORMALIZATIONS else base
        groups.setdefault(base, []).append((number, index))
    if any(len({number for number, _ in group}) < len(group) for group in groups.values()):
        return None  # the same name twice, in two models
    return {base: [index for _, index in sorted(group)] for base, group in groups.items()}


def _attempt(
    way: str, slots: Sequence[Slot], layers: Sequence[SavedLayer], found: Sequence[Slot | None]
) -> Attempt:
    pairs, problems = [], []
    taken: set[int] = set()
    for layer, slot in zip(layers, found, strict=True):
        if slot is None or id(slot) in taken:
            problems.append(f"{layer.path}, in the file alone")
            continue
        taken.add(id(slot))
        problems += _misfits(slot, layer, kinds=True)
        pairs.append(Pair(slot, layer, _assigned(slot, layer) or {}))
    problems += [f"{s.path}, in the model alone" for s in slots if id(s) not in taken]
    return Attempt(way, pairs, problems)


def _unmatched(slots: Sequence[Slot], layers: Sequence[SavedLayer]) -> list[str]:
    """Where no way could even be tried: the layers that the other side has no name for."""
    ours, theirs = {slot.name for slot in slots}, {layer.name for layer in layers}
    problems = [f"{x.path}, in the file alone" for x in layers if x.name not in ours]
    return problems + [f"{s.path}, in the model alone" for s in slots if s.name not in theirs]


def _assigned(slot: Slot, layer: SavedLayer) -> dict[str, np.ndarray] | None:
    """The array of each weight, None where names or numbers are others."""
    needed = {name for name in slot.variables if name not in OPTIONAL}
    if layer.arrays.keys() <= slot.variables.keys() and needed <= layer.arrays.keys():
        return {name: layer.arrays[name] for name in slot.variables if name in layer.arrays}
    if all(name.isdigit() for name in layer.arrays):
        order = [n for n in slot.variables if n not in OPTIONAL]
        order = order if len(order) == len(layer.arrays) else list(slot.variables)
        arrays = list(layer.arrays.values())
        if len(order) == len(arrays):
            return dict(zip(order, arrays, strict=True))
    return None


def _misfits(slot: Slot, layer: SavedLayer, kinds: bool) -> list[str]:
    if kinds and not _same_kind(slot, layer.class_name):
        return [f"{layer.path} is a {layer.class_name}, {slot.path} a {type(slot.layer).__name__}"]
    arrays = _assigned(slot, layer)
    if arrays is None:
        return [
            f"{layer.path} has {', '.join(layer.arrays)}; {slot.path} has "
            f"{', '.join(slot.variables)}"
        ]
    return [
        f"{layer.path}: {name} of shape {array.shape} for {slot.path} of shape "
        f"{tuple(slot.variables[name].shape)}"
        for name, array in arrays.items()
        if array.shape != tuple(slot.variables[name].shape)
    ]


def _same_kind(slot: Slot, saved_class: str | None) -> bool:
    """False only where a class of Keras's own was saved and the layer is none of it."""
    if saved_class is None:
        return True
    kind = snake_case(saved_class)
    if is_normalization(kind):
        return is_batch_normalization(slot.layer)
    if kind not in _own_classes():
        return True
    return kind in {snake_case(base.__name__) for base in type(slot.layer).__mro__}


def _own_classes() -> frozenset[str]:
    if not _OWN:
        found = (getattr(keras.layers, name) for name in dir(keras.layers))
        _OWN.append(frozenset(snake_case(x.__name__) for x in found if isinstance(x, type)))
    return _OWN[0]


_OWN: list[frozenset[str]] = []
