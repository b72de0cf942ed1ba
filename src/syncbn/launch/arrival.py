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
import time
from collections.abc import Sequence

from syncbn.launch.spec import ClusterSpec, split_address

__all__ = ["Arrival"]

_PERIOD = 1.0  # seconds between two attempts


class Arrival:
    """Looks at the addresses of a cluster, without ever waiting for one."""

    def __init__(self, spec: ClusterSpec, timeout: float) -> None:
        self._spec = spec
        self._timeout = timeout
        self._last: dict[int, str] = {}  # what the last attempt at a missing worker came to
        self._missing = list(range(len(spec)))
        self._attempts: dict[int, socket.socket] = {}
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
        host, port = split_address(self._spec.addresses[index])
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM
            )[0]
            attempt = socket.socket(family, kind, protocol)
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
        if select.select([], [attempt], [], 0)[1]:
            self._end(index, attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _end(self, index: int, number: int) -> None:
        self._attempts.pop(index).close()
        if number:
            self._last[index] = os.strerror(number)
            return
        self._missing.remove(index)
        if self._first is None:
            self._first = time.monotonic()
