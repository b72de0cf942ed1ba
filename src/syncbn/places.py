"""Which rows of a ragged global batch lie where: pure arithmetic, the same on every process.

The devices along the batch axis are slots. A batch of n rows on R slots is laid out as XLA lays
out any uneven array: L = ceil(n / R) rows a slot, from the first slot on, so that only the last
slots have less or nothing. Processes bring unequal parts, and a part may be larger than the slots
of its process are to hold, or smaller: the surplus rows move into the holes that others left.
The order of rows in a batch has no meaning for training, so that no other row moves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from syncbn.errors import NotSynchronizableError

__all__ = ["Places", "Slots", "place", "slots_of_processes"]


@dataclass(frozen=True)
class Slots:
    """The slots of the batch axis and who fills them.

    Processes with the same slots (a model that spans processes) form one shard: they bring the
    same rows.
    """

    count: int  # R
    of_shard: tuple[tuple[int, ...], ...]  # slots of each shard, ascending
    shard_of: tuple[int, ...]  # the shard of each process


class Places(NamedTuple):
    """Where the rows of one global batch are, on the way and in the model."""

    rows: int  # n, of the whole batch
    slot_rows: int  # L = ceil(n / R), in the model
    sent_rows: int  # T >= L, a slot on the way there
    positions: tuple[NDArray[np.int32], ...]  # for each shard: where its rows are in its own array
    sources: NDArray[np.int32]  # rows that move: from these of the R*T rows sent
    targets: NDArray[np.int32]  # to these of the R*L rows
    even: bool  # every slot holds L rows and none has to move: Keras's own way will do


def slots_of_processes(owners: Sequence[set[int]], processes: int) -> Slots:
    """Slots from the processes that own a device of each.

    Raises:
        NotSynchronizableError: two processes share some of their slots, but not all.
    """
    own = [
        tuple(slot for slot, holders in enumerate(owners) if process in holders)
        for process in range(processes)
    ]
    shards = tuple(dict.fromkeys(own))
    if sum(len(shard) for shard in shards) != len(owners) or () in shards:
        raise NotSynchronizableError(
            "Every process must hold the same part of the batch axis as another process, or a "
            "part that no other holds. Received parts (slots of each process): "
            f"{dict(enumerate(own))}. Make the device mesh so that its first axes follow the "
            "processes."
        )
    return Slots(len(owners), shards, tuple(shards.index(slots) for slots in own))


@functools.lru_cache(maxsize=1024)
def place(slots: Slots, rows_of_shard: tuple[int, ...]) -> Places:
    """The places of a batch, of which shard s brings `rows_of_shard[s]` rows (n > 0 in all)."""
    rows = sum(rows_of_shard)
    slot_rows = -(-rows // slots.count)
    needed = max(
        -(-count // len(own)) for count, own in zip(rows_of_shard, slots.of_shard, strict=True)
    )
    # Powers of two, here and for the number of moves, so that few shapes have to be compiled.
    sent_rows = slot_rows
    while sent_rows < needed:
        sent_rows *= 2
    held = np.clip(rows - np.arange(slots.count) * slot_rows, 0, slot_rows)
    positions: list[NDArray[np.int32]] = []
    sources: list[int] = []
    targets: list[int] = []
    for count, own in zip(rows_of_shard, slots.of_shard, strict=True):
        kept = [(i, row) for i, slot in enumerate(own) for row in range(held[slot])]
        spare = [(i, row) for i, slot in enumerate(own) for row in range(held[slot], sent_rows)]
        surplus = spare[: max(0, count - len(kept))]
        positions.append(
            np.array([i * sent_rows + row for i, row in kept[:count] + surplus], np.int32)
        )
        sources += [own[i] * sent_rows + row for i, row in surplus]
        targets += [own[i] * slot_rows + row for i, row in kept[count:]]
    moves = 1 << (len(sources) - 1).bit_length() if sources else 0
    padding = moves - len(sources)  # the last move once more
    return Places(
        rows,
        slot_rows,
        sent_rows,
        tuple(positions),
        np.array(sources + sources[-1:] * padding, np.int32),
        np.array(targets + targets[-1:] * padding, np.int32),
        even=rows == slots.count * slot_rows and not sources,
    )
