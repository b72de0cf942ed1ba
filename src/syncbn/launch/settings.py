"""What a launch is asked to do, and whether it can be done."""

from __future__ import annotations

import dataclasses
import math

from syncbn.errors import InputError
from syncbn.launch.resources import BACKENDS
from syncbn.launch.spec import parse_hosts

__all__ = ["LaunchSettings"]

_MOST_WORKERS = 4096


@dataclasses.dataclass(frozen=True)
class LaunchSettings:
    """One launch.

    Attributes:
        workers: on each machine.
        hosts: "a:p,b:p", one a machine; None for workers on this machine alone.
        index: which of the hosts this machine is.
        devices_per_worker: GPUs, or virtual CPU devices; None for an equal share of the GPUs.
        backend: "tensorflow", "jax" or "torch"; None for what Keras would take.
        max_restarts: how often the whole group is started again after a failure.
        timeout: seconds that a worker may be missing; training waits as long for a peer.
        grace: seconds between SIGTERM and SIGKILL.
        log_dir: a folder for the whole output of each worker, or None.
        isolate: whether the workers get a network of their own that nothing else reaches; None for
            where the kernel allows it.
        quiet: show nothing of the workers' output but the last lines of one that failed.
    """

    workers: int = 2
    hosts: str | None = None
    index: int | None = None
    devices_per_worker: int | None = None
    backend: str | None = None
    max_restarts: int = 0
    timeout: float = 120.0
    grace: float = 5.0
    log_dir: str | None = None
    isolate: bool | None = None
    quiet: bool = False

    def check(self) -> None:
        """Raise an InputError for the first value that cannot be meant."""
        for option, count, least in (
            ("--workers", self.workers, 1),
            ("--max-restarts", self.max_restarts, 0),
            ("--devices-per-worker", self.devices_per_worker or 1, 1),
        ):
            if not least <= count <= _MOST_WORKERS:
                raise InputError(
                    f"{option} requires a number from {least} to {_MOST_WORKERS}. "
                    f"Received: {count}. Give another number."
                )
        if self.devices_per_worker == 0:
            raise InputError("--devices-per-worker requires at least 1. Received: 0. Give more.")
        for option, seconds in (("--timeout", self.timeout), ("--grace", self.grace)):
            if not 0 < seconds < math.inf:
                raise InputError(
                    f"{option} requires seconds, more than 0. Received: {seconds}. Give another."
                )
        if self.backend is not None and self.backend not in BACKENDS:
            raise InputError(
                f"--backend requires one of {', '.join(BACKENDS)}. Received: {self.backend!r}."
            )
        self._check_hosts()

    def _check_hosts(self) -> None:
        if self.hosts is None:
            if self.index is not None:
                raise InputError(
                    f"--index requires --hosts, of which it is a number. Received: {self.index} "
                    "without --hosts. Add --hosts a:port,b:port, or leave --index out."
                )
            return
        hosts = parse_hosts(self.hosts, self.workers)
        if self.index is None or not 0 <= self.index < len(hosts):
            raise InputError(
                f"--index requires the number of this machine among the --hosts, from 0 to "
                f"{len(hosts) - 1}. Received: {self.index}. Give the number of "
                f"one of {', '.join(hosts)}."
            )
        if self.isolate and len(hosts) > 1:
            raise InputError(
                "--isolate cuts the workers off from every other machine. Received: --isolate "
                "with --hosts. Leave one of them out."
            )
