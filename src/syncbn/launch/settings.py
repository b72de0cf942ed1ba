"""What a launch is asked to do, and whether it can be done."""

from __future__ import annotations

import dataclasses
import math

from syncbn.errors import InputError
from syncbn.launch.resources import BACKENDS
from syncbn.launch.spec import parse_hosts

__all__ = ["CLUSTERS", "LaunchSettings"]

CLUSTERS = ("none", "slurm", "mpi")

_MOST_WORKERS = 4096


@dataclasses.dataclass(frozen=True)
class LaunchSettings:
    """One launch.

    Attributes:
        workers: on each machine; with `cluster`, of each task.
        hosts: "a:p,b:p", one a machine; None for workers on this machine alone, or where
            `cluster` tells.
        index: which of the hosts this machine is; None where `cluster` tells.
        cluster: "slurm" or "mpi" where this process is a task of srun's or mpirun's, whose
            environment tells the others; "none" where it is not, or is not to be looked at.
        port: the first port of the workers of each machine, where `cluster` tells the machines.
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
    cluster: str = "none"
    port: int | None = None
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
        self._check_cluster()
        self._check_hosts()

    def _check_cluster(self) -> None:
        if self.cluster not in CLUSTERS:
            raise InputError(
                f"--cluster requires one of {', '.join(CLUSTERS)}. Received: {self.cluster!r}."
            )
        if self.port is not None:
            if self.cluster == "none" or self.hosts is not None:
                raise InputError(
                    "--port is for several tasks of srun or mpirun without --hosts, which have "
                    f"ports of their own. Received: --port {self.port} with --cluster "
                    f"{self.cluster}{'' if self.hosts is None else ' and --hosts'}. Leave it out."
                )
            if not 1 <= self.port <= 65535:
                raise InputError(
                    f"--port requires a number from 1 to 65535. Received: {self.port}. Give "
                    "another."
                )
        if self.cluster != "none" and self.isolate:
            raise InputError(
                "--isolate cuts the workers off from those of the other tasks. Received: --isolate "
                f"with --cluster {self.cluster}. Leave --isolate out, or give --cluster none."
            )
        if self.cluster != "none" and self.index is not None:
            raise InputError(
                "--index is for launchers whose place nothing else tells. Received: "
                f"{self.index} with --cluster {self.cluster}, which tells it. Leave one of them "
                "out."
            )

    def _check_hosts(self) -> None:
        if self.cluster != "none":
            return  # how many workers each has is known with the task
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
