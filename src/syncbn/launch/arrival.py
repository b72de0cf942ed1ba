"""Which workers have come up: whose address has a TensorFlow server listening.

TensorFlow's workers wait for each other without saying for whom. Where one is listening and another
is not after the timeout, that one is named. JAX and torch do not listen at these addresses, and
say themselves whom they miss.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from syncbn.launch.spec import ClusterSpec, split_address

__all__ = ["Arrival"]

_PERIOD = 0.25  # seconds between two attempts
_Place = tuple[int, Any]  # a family of addresses, and an address of it


class _Name:
    """The addresses of a host, asked for aside: a server for names may take long to say nothing."""

    def __init__(self, host: str, port: int) -> None:
        self._asked = (host.strip("[]"), port)
        self._places: deque[_Place] = deque()
        self.error: str | None = None
        if not self._find(socket.AI_NUMERICHOST):
            self.error = None
            # It must not hold up the end of the process either.
            threading.Thread(target=self._find, daemon=True).start()

    def place(self) -> _Place | None:
        """Its addresses in turn; None as long as there are none."""
        self._places.rotate(-1)
        return self._places[-1] if self._places else None

    def _find(self, flags: int = 0) -> bool:
        try:
            found = socket.getaddrinfo(*self._asked, type=socket.SOCK_STREAM, flags=flags)
        except (OSError, UnicodeError) as error:  # the latter for a name that is none
            self.error = getattr(error, "strerror", None) or str(error)
            return False
        self._places.extend((place[0], place[4]) for place in found)
        return True


class Arrival:
    """Looks at the addresses of a cluster, without ever waiting for one."""

    def __init__(self, spec: ClusterSpec, timeout: float) -> None:
        self._spec = spec
        self._timeout = timeout
        self._last: dict[int, str] = {}  # what the last attempt at a missing worker came to
        self._missing = list(range(len(spec)))
        self._attempts: dict[int, socket.socket] = {}
        self._names: dict[int, _Name] = {}
        self._next = 0.0
        self._first: float | None = None

    def look(self) -> None:
        """Begin new attempts and see what became of the old ones."""
        for index, attempt in list(self._attempts.items()):
            self._conclude(index, attempt)
        if time.monotonic() >= self._next and self._missing:
            self._next = time.monotonic() + _PERIOD
            for index in self._missing:
                if index not in self._attempts:
                    self._begin(index)

    def overdue(self) -> Sequence[int]:
        """The workers that are missing although another has been there for the timeout."""
        late = self._first is not None and time.monotonic() - self._first >= self._timeout
        return self._missing if late else ()

    def found(self, index: int) -> str:
        """What a missing worker's address answers."""
        return self._last.get(index, "no answer")

    def close(self) -> None:
        """Give up the attempts that are under way."""
        for attempt in self._attempts.values():
            attempt.close()
        self._attempts.clear()

    def _begin(self, index: int) -> None:
        name = self._names.get(index)
        if name is not None and name.error is not None:
            self._last[index] = name.error
            name = None
        if name is None:
            name = self._names[index] = _Name(*split_address(self._spec.addresses[index]))
        place = name.place()
        if place is None:
            self._last.setdefault(index, "its name is being looked up")
            return
        family, address = place
        try:
            attempt = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            self._last[index] = error.strerror or str(error)
            return
        attempt.setblocking(False)
        self._attempts[index] = attempt
        # connect_ex says 0, that it is under way, or what is wrong.
        number = attempt.connect_ex(address)
        if number != errno.EINPROGRESS:
            self._end(index, number)

    def _conclude(self, index: int, attempt: socket.socket) -> None:
        poll = select.poll()  # select() knows no descriptor from 1024
        poll.register(attempt, select.POLLOUT)
        if poll.poll(0):
            self._end(index, attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _end(self, index: int, number: int) -> None:
        self._attempts.pop(index).close()
        if number:
            self._last[index] = os.strerror(number)
            return
        self._missing.remove(index)
        if self._first is None:
            self._first = time.monotonic()
