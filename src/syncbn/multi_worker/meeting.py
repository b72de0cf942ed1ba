"""All workers meet before TensorFlow starts, so that one that never comes is named.

TensorFlow starts its server and then waits for the others within one call into C++, for up to an
hour and with Python's lock held: no thread, no signal and no Ctrl-C gets through, and a timeout of
its own is the registration's alone, not the chief's. Here the workers greet the chief beforehand,
by a line of text at the address that its server is about to have. The chief answers when all have
come, or says to all that have who is missing.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Sequence

from syncbn.errors import WorkerError

__all__ = ["meet"]

GREETING = "syncbn worker "
GO = "go"
MISSING = "missing "
PERIOD = 0.2  # seconds between two attempts to reach the chief
PATIENCE = 10.0  # seconds that a chief may be slower with its answer than it ought to
LONGEST = 4096  # bytes of a line


def meet(addresses: Sequence[str], index: int, timeout: float) -> None:
    """Return when every worker has come; each calls it, `index` being its own number.

    Raises:
        WorkerError: somebody has not come in time, or this worker's port is taken.
    """
    with _listening(addresses, index) as listener:
        if index == 0:
            _receive(listener, addresses, timeout)
        else:
            # The listener is for those who look whether this worker is there: the launcher.
            _greet(addresses, index, timeout)


def _listening(addresses: Sequence[str], index: int) -> socket.socket:
    """On all interfaces, as TensorFlow's server will."""
    port = int(addresses[index].rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=128)
    except OSError as error:
        raise WorkerError(
            f"A worker requires the port of its address in TF_CONFIG. Received: worker {index} "
            f"({addresses[index]}): {error.strerror or error}. End the process that has the port, "
            "or give another one."
        ) from error


def _receive(listener: socket.socket, addresses: Sequence[str], timeout: float) -> None:
    """The chief's part."""
    deadline = time.monotonic() + timeout
    arrived: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(arrived) < len(addresses) - 1 and time.monotonic() < deadline:
            for key, _ in selector.select(PERIOD):
                if key.fileobj is listener:
                    guest = stack.enter_context(listener.accept()[0])
                    guest.settimeout(PERIOD)
                    selector.register(guest, selectors.EVENT_READ)
                    continue
                guest = key.fileobj  # type: ignore[assignment]
                arrived = {number: other for number, other in arrived.items() if other is not guest}
                number = _number(_read(guest), len(addresses))
                if number is None:  # it is gone, or no worker of ours
                    selector.unregister(guest)
                    guest.close()
                else:
                    arrived[number] = guest
        missing = [number for number in range(1, len(addresses)) if number not in arrived]
        answer = MISSING + ",".join(map(str, missing)) if missing else GO
        for guest in arrived.values():
            _answer(guest, answer)
    if missing:
        raise _late(addresses, 0, missing, timeout)


def _answer(guest: socket.socket, answer: str) -> None:
    """Then let it hang up first: who does keeps the port for a while."""
    with contextlib.suppress(OSError):
        guest.sendall(f"{answer}\n".encode())
        guest.settimeout(2.0)
        guest.recv(1)


def _greet(addresses: Sequence[str], index: int, timeout: float) -> None:
    """The part of all others."""
    host, _, port = addresses[0].rpartition(":")
    deadline = time.monotonic() + timeout
    found = "nobody answers"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0) as chief:
                chief.sendall(f"{GREETING}{index}\n".encode())
                # The chief, which may have begun later, has its own timeout first.
                chief.settimeout(timeout + PATIENCE)
                answer = _read(chief)
        except OSError as error:
            found = error.strerror or str(error)
            answer = ""
        if answer == GO:
            return
        if answer.startswith(MISSING):
            missing = [int(number) for number in answer.removeprefix(MISSING).split(",")]
            raise _late(addresses, index, missing, timeout)
        if answer:
            found = "it answers, but not as a chief that called enable_multi_worker()"
        time.sleep(PERIOD)
    raise _late(addresses, index, [0], timeout, found)


def _read(connection: socket.socket) -> str:
    """One line; nothing where the other has hung up, or says none in the connection's timeout."""
    received = b""
    deadline = time.monotonic() + (connection.gettimeout() or 0)
    with contextlib.suppress(OSError):
        while not received.endswith(b"\n") and len(received) < LONGEST:
            # The rest for the rest of the line: one byte after another must not hold up the chief.
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            more = connection.recv(LONGEST)
            if not more:
                break
            received += more
    return received.decode(errors="replace").strip()


def _number(greeting: str, workers: int) -> int | None:
    text = greeting.removeprefix(GREETING)
    if text == greeting or not (text.isascii() and text.isdigit()):
        return None
    return int(text) if 0 < int(text) < workers else None


def _late(
    addresses: Sequence[str], index: int, missing: Sequence[int], timeout: float, found: str = ""
) -> WorkerError:
    names = ", ".join(f"worker {number} ({addresses[number]})" for number in missing)
    error: WorkerError = WorkerError(
        f"Training requires all {len(addresses)} workers of TF_CONFIG. Received: {names} did not "
        f"come in {timeout:g} s{': ' + found if found else ''}. This is worker {index} "
        f"({addresses[index]}). Start the same program on all of them, which calls "
        "enable_multi_worker() and then makes its strategy; see that they reach each other; or "
        "give enable_multi_worker(timeout=…) more seconds."
    )
    return error
