"""What a process manager says of a process that it started, in its environment: pure.

`srun` and `mpirun` start the launcher once for each task; each of these launchers then starts its
own workers, and all of them are one cluster. Who they are, each finds for itself: all come to the
same, or one stops with an error, and the manager ends the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from syncbn.errors import InputError

__all__ = ["FIRST_PORT", "LAST_PORT", "PORTS", "Task", "block_of", "number"]

# Above the ports of the system's services, below those that Linux gives to outgoing connections.
FIRST_PORT = 10000
PORTS = 32  # of a block: the workers of a node, and one where JAX or torch meet
_BLOCKS = 683  # a prime, so that jobs whose numbers differ by a round number do not meet
LAST_PORT = FIRST_PORT + PORTS * _BLOCKS - 1


@dataclass(frozen=True)
class Task:
    """One task of several.

    Attributes:
        manager: who started it, as messages say it: "srun step 12.0".
        rank: its number, from 0.
        nodes: the name of each node; 127.0.0.1 where there is one alone.
        node_of: for each task, in the order of their numbers, its node's place in `nodes`.
        block: which block of ports is the cluster's; see `first_port`.
        cores: those that this task may use.
        has_own_gpus: whether the GPUs that it sees are its alone, and not those of its node.
    """

    manager: str
    rank: int
    nodes: tuple[str, ...]
    node_of: tuple[int, ...]
    block: int
    cores: int
    has_own_gpus: bool = False

    def __len__(self) -> int:
        return len(self.node_of)

    @property
    def local_rank(self) -> int:
        """Its place among the tasks of its node."""
        return self.node_of[: self.rank].count(self.node_of[self.rank])

    @property
    def local_size(self) -> int:
        """How many tasks its node has."""
        return self.node_of.count(self.node_of[self.rank])

    def places(self, port: int | None, workers: int) -> list[tuple[str, int]]:
        """The host and the first port of each node.

        Without `port` that is 10000 + 32 · block.

        Args:
            port: the first, or None for the block's.
            workers: that each task starts.

        Raises:
            InputError: a node's workers, and one port more, are more than a block has.
        """
        most = max(map(self.node_of.count, range(len(self.nodes)))) * workers
        if port is None and most >= PORTS:
            raise InputError(
                f"{self.manager} keeps {PORTS - 1} ports for the workers of a node. Received: "
                f"{most} workers on one. Give the first of {most + 1} free ports: --port."
            )
        first = FIRST_PORT + PORTS * self.block if port is None else port
        return [(node, first) for node in self.nodes]


def block_of(count: int) -> int:
    """The block of ports for a number that all tasks know."""
    return count % _BLOCKS


def number(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    """A variable that is a whole number.

    Raises:
        InputError: it is none, or too small.
    """
    text = environment.get(name, "")
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise InputError(
            f"{name} requires a whole number from {least}. Received: {text!r}. Start the program "
            "by srun or mpirun, which set it, or give --cluster none."
        )
    return int(text)
