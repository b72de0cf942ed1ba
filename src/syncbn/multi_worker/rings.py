"""Numbers of collectives that come again, and when they may not.

TensorFlow keeps a record of every collective by its number, for ever, and worker 0 is asked for
each that is new. A number can come again for the same dtype and shape, if two things hold:

- No collective of that number is under way. TensorFlow orders those of a device one after another,
  and a call of a function returns when all of its own are done.
- None was broken off. A call that ends by an error, as by the end of the data, cancels what is
  under way; its request stays at the other worker, and takes the answer to the next one of that
  number, which then waits for ever. So a call that fails gives up the numbers that it took.

Every worker must choose alike. They come by the same collectives in the same order; where one
fails alone they no longer do, and see it when they meet at the next operation: all start anew,
above every number that any of them has used.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

__all__ = ["FIRST", "RING", "Numbers", "Rings", "State", "numbers"]

RING = 64  # numbers of each kind of collective
FIRST = 1 << 24  # TensorFlow's own count upwards from 100

State = list[list[int]]


class Rings:
    """The numbers of one group of devices, for one of its devices.

    All devices of the group come by the same kinds in the same order, as they come by all
    collectives.
    """

    def __init__(self, first: int = FIRST) -> None:
        self._lock = threading.Lock()
        self.start_anew(first)

    def start_anew(self, first: int) -> None:
        """Forget all rings; no number below `first` is given any more."""
        with self._lock:
            self.unused = first
            self.digest = 0
            self._rings: dict[Hashable, list[int]] = {}
            self._used: Counter[Hashable] = Counter()
            self._taken: list[tuple[Hashable, int]] | None = None  # outside of a call

    def next(self, kind: Hashable) -> int:
        """The next number of a kind's ring."""
        with self._lock:
            ring = self._rings.setdefault(kind, [])
            place = self._used[kind] % RING
            self._used[kind] += 1
            if place == len(ring):
                ring.append(self._new())
            if self._taken is not None:
                self._taken.append((kind, place))
            self._note(kind, ring[place])
            return ring[place]

    def begin(self) -> None:
        """From now on what is taken may have to be given up."""
        with self._lock:
            self._taken = []

    def end(self, *, failed: bool) -> None:
        """Give up what was taken since `begin` if the call failed: other numbers in its place."""
        with self._lock:
            for kind, place in (self._taken or ()) if failed else ():
                self._rings[kind][place] = self._new()
                self._note(kind, self._rings[kind][place])
            self._taken = None

    def _new(self) -> int:
        self.unused += 1
        return self.unused - 1

    def _note(self, kind: Hashable, number: int) -> None:
        self.digest = zlib.crc32(repr((kind, number)).encode(), self.digest)


class Numbers:
    """All rings of this process: TensorFlow's records are the process's, whatever the strategy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rings: dict[tuple[int, str], Rings] = {}
        self._first = FIRST
        self._operations = 0
        self._calls = 0

    def rings(self, group: int, device: str) -> Rings:
        """Those of a group's device: launchers and strategies are made anew."""
        with self._lock:
            if (group, device) not in self._rings:
                self._rings[group, device] = rings = Rings(self._first)
                if self._calls:
                    rings.begin()
            return self._rings[group, device]

    @property
    def are_agreed(self) -> bool:
        """Whether the workers met for this operation, and an error of this call will be seen."""
        return self._operations > 0 and self._calls > 0

    @contextmanager
    def operation(self) -> Iterator[None]:
        """While an operation runs for which the workers have met."""
        self._operations += 1
        try:
            yield
        finally:
            self._operations -= 1

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of a function with collectives."""
        for rings in self._rings.values():
            rings.begin()
        self._calls += 1
        failed = True
        try:
            yield
            failed = False
        finally:
            self._calls -= 1
            for rings in self._rings.values():
                rings.end(failed=failed)

    def state(self) -> State:
        """What must be the same on all workers, for JSON: of each device group, digest, unused."""
        return sorted(
            [group, rings.digest, rings.unused]
            for (group, _), rings in self._rings.items()
            if rings.digest
        )

    def agree(self, states: list[State]) -> None:
        """Start anew unless all workers have the same state.

        Args:
            states: of every worker, this one's included.
        """
        if all(state == states[0] for state in states):
            return
        unused = [entry[2] for state in states for entry in state]
        with self._lock:
            self._first = max([self._first, *unused])
            for rings in self._rings.values():
                rings.start_anew(self._first)


numbers = Numbers()
"""This process's."""
