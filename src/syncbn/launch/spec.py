"""Who takes part in a training, and what each worker is told about it: pure, no processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from syncbn.errors import InputError

__all__ = ["MARK", "ClusterSpec", "parse_hosts", "split_address"]

# In the environment of every worker and of all that it starts: by which launches, "A:B".
MARK = "SYNCBN_LAUNCH_ID"

_LARGEST_PORT = 65535


@dataclass(frozen=True)
class ClusterSpec:
    """The workers of a training, in the order of their numbers; worker 0 is the chief.

    Attributes:
        addresses: "host:port" of each worker, where TensorFlow's server of that worker listens.
        rendezvous: "host:port" at worker 0, where JAX's coordinator or torch's store listens. It is
            none of the addresses, so that whoever listens at one of those is TensorFlow.
        machines: the number of the machine of each worker.
    """

    addresses: tuple[str, ...]
    rendezvous: str
    machines: tuple[int, ...]

    @classmethod
    def on_this_machine(cls, ports: list[int]) -> ClusterSpec:
        """All workers on 127.0.0.1; the last of the ports is the rendezvous."""
        addresses = tuple(f"127.0.0.1:{port}" for port in ports)
        return cls(addresses[:-1], addresses[-1], (0,) * (len(ports) - 1))

    @classmethod
    def on_hosts(cls, hosts: tuple[str, ...], workers: int = 1) -> ClusterSpec:
        """So many workers on each host, at the port that is given with it and those that follow.

        The rendezvous is at the first host, at the port after those of its workers.
        """
        places = [split_address(host) for host in hosts]
        return cls.on_machines(
            places, [machine for machine in range(len(hosts)) for _ in range(workers)]
        )

    @classmethod
    def on_machines(cls, places: Sequence[tuple[str, int]], machines: Sequence[int]) -> ClusterSpec:
        """Workers whose machines are given, in the order of their numbers.

        Each takes the next port of its machine. The rendezvous is at worker 0's machine, at the
        port after those of its workers.

        Args:
            places: the host and the first port of each machine.
            machines: for each worker, the place of its machine in `places`.

        Raises:
            InputError: a machine's ports do not suffice.
        """
        ports = [port for _, port in places]
        addresses = []
        for machine in machines:
            addresses.append(f"{places[machine][0]}:{ports[machine]}")
            ports[machine] += 1
        if max(ports) > _LARGEST_PORT:
            raise InputError(
                f"Ports end at {_LARGEST_PORT}. Received: {max(ports)} as one of {len(machines)} "
                "workers' or as the one where they meet. Give a lower one."
            )
        rendezvous = f"{places[machines[0]][0]}:{ports[machines[0]]}"
        return cls(tuple(addresses), rendezvous, tuple(machines))

    def __len__(self) -> int:
        return len(self.addresses)

    def name(self, index: int) -> str:
        """How messages call a worker: "worker 1 (127.0.0.1:4123)"."""
        return f"worker {index} ({self.addresses[index]})"

    def local_workers(self, machine: int) -> Sequence[int]:
        """The numbers of the workers on the machine of that number."""
        return [index for index, other in enumerate(self.machines) if other == machine]

    def environment(self, index: int) -> Mapping[str, str]:
        """What worker `index` reads about the cluster, for each framework by its own convention.

        TensorFlow: `TF_CONFIG`, as `tf.distribute.cluster_resolver.TFConfigClusterResolver` reads.
        JAX: `KERAS_DISTRIBUTION_*`, as `keras.distribution.initialize()` reads.
        torch: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, …, as `torch.distributed`'s env:// reads.
        """
        host, port = split_address(self.rendezvous)
        local = self.local_workers(self.machines[index])
        config = {
            "cluster": {"worker": list(self.addresses)},
            "task": {"type": "worker", "index": index},
        }
        return {
            "TF_CONFIG": json.dumps(config),
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": self.rendezvous,
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(len(self)),
            "KERAS_DISTRIBUTION_PROCESS_ID": str(index),
            "RANK": str(index),
            "WORLD_SIZE": str(len(self)),
            "LOCAL_RANK": str(local.index(index)),
            "LOCAL_WORLD_SIZE": str(len(local)),
            "GROUP_RANK": str(self.machines[index]),
            "MASTER_ADDR": host.strip("[]"),
            "MASTER_PORT": str(port),
        }


def split_address(address: str) -> tuple[str, int]:
    """The host and the port of "host:port"; an IPv6 host stands in brackets.

    Raises:
        InputError: it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    whole = host.startswith("[") == host.endswith("]") and (":" not in host or host[0] == "[")
    if not (host.strip("[]") and colon and whole and port.isascii() and port.isdigit()):
        raise InputError(
            "A worker's address requires host:port, as 10.0.0.1:12345 or [fe80::1]:12345. "
            f"Received: {address!r}. Add what is missing."
        )
    if not 1 <= int(port) <= _LARGEST_PORT:
        raise InputError(
            f"A port requires a number from 1 to {_LARGEST_PORT}. Received: {address!r}. "
            "Give another port."
        )
    return host, int(port)


def parse_hosts(text: str, workers: int) -> tuple[str, ...]:
    """The hosts of "a:p,b:p".

    Args:
        text: as it was given.
        workers: how many ports each host needs for them; one more is the rendezvous.

    Raises:
        InputError: one is not host:port, two would share a port, or there are too few ports.
    """
    hosts = tuple(part.strip() for part in text.split(","))
    taken: set[tuple[str, int]] = set()
    for number, address in enumerate(hosts):
        host, port = split_address(address)
        last = port + workers - 1 + (number == 0)
        if last > _LARGEST_PORT:
            raise InputError(
                f"{workers} worker(s) on {host} require the ports {port} to {last}. Received: "
                f"{address!r}, and ports end at {_LARGEST_PORT}. Give a lower port."
            )
        ports = {(host, used) for used in range(port, last + 1)}
        if ports & taken:
            raise InputError(
                "Every worker requires an address of its own; the first host also keeps the port "
                f"after its workers' for JAX and torch. Received: {text!r}, where {address} meets "
                "another. Give other ports."
            )
        taken |= ports
    return hosts
