"""The structure of a batch as a text, so that a process without rows can join with empty ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from syncbn.errors import InputError

__all__ = ["described", "empty", "map_arrays", "row_count"]


def map_arrays(function: Callable[[Any], Any], batch: Any) -> Any:
    """The same structure of the results of a function, called in the same order everywhere."""
    if batch is None:
        return None
    if isinstance(batch, dict):
        by_key = {key: map_arrays(function, batch[key]) for key in sorted(batch)}
        return type(batch)((key, by_key[key]) for key in batch)
    if isinstance(batch, (tuple, list)):
        results = [map_arrays(function, part) for part in batch]
        return type(batch)(*results) if hasattr(batch, "_fields") else type(batch)(results)
    return function(batch)


def _arrays(batch: Any) -> list[Any]:
    found: list[Any] = []
    map_arrays(found.append, batch)
    return found


def row_count(batch: Any) -> int:
    """How many rows a batch has.

    Raises:
        InputError: its arrays have different numbers of rows, or one has no rows at all.
    """
    arrays = _arrays(batch)
    shapes = [getattr(array, "shape", None) for array in arrays]
    if not arrays or any(not shape for shape in shapes):
        raise InputError(
            f"Every array of a batch must have rows as its first axis. Received shapes: {shapes}."
        )
    counts = {int(shape[0]) for shape in shapes if shape}
    if len(counts) > 1:
        raise InputError(
            f"All arrays of a batch must have the same number of rows. Received shapes: {shapes}."
        )
    return counts.pop()


def described(batch: Any, dtype_name: Callable[[Any], str]) -> str:
    """The structure with dtypes and shapes, apart from the number of rows."""

    def describe(part: Any) -> Any:
        if part is None:
            return None
        if isinstance(part, dict):
            return {"dict": [[str(key), describe(part[key])] for key in sorted(part)]}
        if isinstance(part, (tuple, list)):
            kind = "list" if isinstance(part, list) else "tuple"
            return {kind: [describe(element) for element in part]}
        return [dtype_name(part.dtype), *map(int, part.shape[1:])]

    return json.dumps(describe(batch))


def empty(description: str) -> Any:
    """A batch of no rows from its description."""

    def build(part: Any) -> Any:
        if part is None:
            return None
        if isinstance(part, list):
            return np.zeros((0, *part[1:]), np.dtype(part[0]))
        ((kind, elements),) = part.items()
        if kind == "dict":
            return {key: build(element) for key, element in elements}
        return (list if kind == "list" else tuple)(build(element) for element in elements)

    return build(json.loads(description))
