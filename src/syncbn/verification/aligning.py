"""Which rows of the global batch each replica held, and its results in the order of the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Parts", "difference", "gathered", "parts_of"]


class Parts(NamedTuple):
    """The rows of the global batch that each replica held.

    Attributes:
        rows: by replica; empty for one that had none.
        size: of the global batch.
        complete: whether every row was held once, and nothing else.
        words: what was held, where that is not so.
    """

    rows: Mapping[int, Any]
    size: int
    complete: bool
    words: str = ""

    @property
    def order(self) -> list[int]:
        """The replicas that held something."""
        return [replica for replica, rows in sorted(self.rows.items()) if len(rows)]

    @property
    def sizes(self) -> list[int]:
        """Rows of each replica."""
        return [len(rows) for _, rows in sorted(self.rows.items())]


def parts_of(
    whole: Sequence[Any], held: Mapping[int, Sequence[Any]], replicas: int, shared: bool
) -> Parts:
    """Find each replica's rows in the global batch, by their content.

    Args:
        whole: the flat arrays of the global batch.
        held: those of each replica.
        replicas: how many there are.
        shared: whether one process computed for all replicas at once, on arrays laid out over them
            in equal parts one behind another, as JAX does.
    """
    size = len(whole[0])
    if shared:
        edges = [-(-size * number // replicas) for number in range(replicas + 1)]
        rows = {r: np.arange(edges[r], edges[r + 1]) for r in range(replicas)}
        same = len(held.get(0, [[]])[0]) == size
        return Parts(rows, size, same, "" if same else "another number of examples")
    places: dict[bytes, list[int]] = {}
    for number, key in enumerate(_keys(whole)):
        places.setdefault(key, []).append(number)
    found: dict[int, Any] = {}
    unknown = 0
    for replica in range(replicas):
        mine = []
        for key in _keys(held.get(replica, ())):
            if places.get(key):
                mine.append(places[key].pop(0))
            else:
                unknown += 1
        found[replica] = np.array(mine, dtype=np.int64)
    missing = sum(map(len, places.values()))
    words = (
        f"{missing} of the {size} examples on no replica, and {unknown} that are twice or none of "
        "the batch's"
    )
    complete = not missing and not unknown
    return Parts(found, size, complete, "" if complete else words)


def _keys(arrays: Sequence[Any]) -> list[bytes]:
    """A key for each row, of all arrays with such rows; Keras may have added a last axis of 1."""
    length = len(arrays[0]) if len(arrays) and np.ndim(arrays[0]) else 0
    of_rows = [array for array in arrays if np.ndim(array) and len(array) == length]
    keys = []
    for number in range(length):
        digest = hashlib.blake2b(digest_size=16)
        for array in of_rows:
            row = np.asarray(array[number])
            # In one dtype: Keras casts floats to its floatx.
            wide = row.astype(np.float32) if row.dtype.kind == "f" else row.astype(np.int64)
            digest.update(np.ascontiguousarray(wide).tobytes())
        keys.append(digest.digest())
    return keys


def gathered(values: Mapping[int, Any], parts: Parts, reference: Any, shared: bool) -> Any | None:
    """The rows of all replicas in the order of the batch; None where these are no rows.

    Args:
        values: an array of each replica.
        parts: who held which rows.
        reference: what one device has in that place.
        shared: as in `parts_of`.
    """
    if shared:
        return values.get(0)
    if np.ndim(reference) == 0 or not parts.size or len(reference) % parts.size:
        return None
    # Several rows an example, as where positions are folded into the batch.
    each = len(reference) // parts.size
    whole = np.full_like(reference, 0)
    for replica, rows in parts.rows.items():
        array = values.get(replica)
        if array is None and not len(rows):
            continue
        if array is None or np.shape(array) != (len(rows) * each, *reference.shape[1:]):
            return None
        places = (rows[:, None] * each + np.arange(each)).reshape(-1)
        whole[places] = array
    return whole


def difference(value: Any, reference: Any) -> float:
    """Largest absolute difference relative to the largest absolute value of the reference.

    What is not finite in both counts as equal where it is the same; otherwise the result is NaN.
    """
    own, its = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if own.shape != its.shape:
        return float("nan")
    if not own.size:
        return 0.0
    finite = np.isfinite(its)
    both = ~finite & (np.isnan(own) & np.isnan(its) | (own == its))
    if np.any(~(finite & np.isfinite(own)) & ~both):
        return float("nan")
    gap = float(np.max(np.abs(own[finite] - its[finite]), initial=0.0))
    return gap / scale_of(its)


def scale_of(reference: Any) -> float:
    """The largest absolute value that is finite, or 1 where there is none but 0."""
    reference = np.asarray(reference, np.float64)
    finite = reference[np.isfinite(reference)]
    return float(np.max(np.abs(finite), initial=0.0)) or 1.0
