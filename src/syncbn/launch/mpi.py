"""A rank of an MPI program, by the environment that `mpirun` or `mpiexec` gives it: pure.

MPI itself is not used, and needs not be there on the other side: the launcher takes the numbers
alone. They do not say where the other ranks are. On one node that is no question; on several the
nodes are the job's, where Slurm made it, or the user's --hosts, with the ranks of each node
following each other (Open MPI's `--map-by slot`, Hydra's `-ppn`, both the default).

References:
    Open MPI, "mpirun" manual, section "Environment Variables"; Intel MPI Library Developer
    Reference, "Hydra Environment Variables"; MPICH, src/pm/hydra. Recorded environments of Open MPI
    4.1.4 and MPICH 4.0.2 are in tests/unit/environments.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from syncbn.errors import InputError
from syncbn.launch import slurm
from syncbn.launch.tasks import Task, block_of, number

__all__ = ["find", "is_rank", "size"]


class _Names(NamedTuple):
    """How an implementation calls a rank's numbers."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_OPEN_MPI = _Names(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
# Of MPICH and all that is made from it. Slurm's own PMI sets the first two, but not the others.
_HYDRA = _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether mpirun started this process."""
    return _names(environment) is not None


def size(environment: Mapping[str, str]) -> int:
    """How many ranks there are."""
    return number(environment, _known(environment).size, 1)


def find(
    environment: Mapping[str, str],
    cores: int,
    machine_cores: int,
    hosts: Sequence[str] | None,
    host_name: str,
) -> Task:
    """The rank that this process is.

    Args:
        environment: this process's.
        cores: those that this process may use.
        machine_cores: those that there are.
        hosts: those that were given, one a node, in the order of the ranks; or None.
        host_name: this machine's.

    Raises:
        InputError: the environment contradicts itself, or does not tell which rank is where.
    """
    names = _known(environment)
    count = number(environment, names.size, 1)
    rank = number(environment, names.rank)
    local_size = number(environment, names.local_size, 1)
    local_rank = number(environment, names.local_rank)
    manager = _manager(environment, names)
    if rank >= count or local_size > count or local_rank >= local_size:
        raise InputError(
            f"{manager} requires an environment whose numbers agree. Received: {names.rank}={rank} "
            f"of {count}, {names.local_rank}={local_rank} of {local_size}. Start the program by "
            "mpirun itself, or give --cluster none."
        )
    many = local_size < count
    # Each rank checks its own place: all follow each other on their nodes, or one says so.
    if many and (count % local_size or local_rank != rank % local_size):
        raise InputError(
            f"{manager} requires the same number of ranks on every node, following each other. "
            f"Received: rank {rank} of {count} is {local_rank} of the {local_size} on its node. "
            "Give mpirun --map-by slot (Open MPI) or -ppn (MPICH, Intel) and a number of ranks "
            "that the nodes divide, or start the launchers by srun."
        )
    node_of = tuple(other // local_size for other in range(count))
    return Task(
        manager=manager,
        rank=rank,
        nodes=_nodes(environment, manager, hosts, host_name, node_of, rank),
        node_of=node_of,
        block=_block(environment, names),
        cores=_own_cores(environment, cores, machine_cores, local_size),
    )


def _names(environment: Mapping[str, str]) -> _Names | None:
    return next((one for one in (_OPEN_MPI, _HYDRA) if {*one} <= environment.keys()), None)


def _known(environment: Mapping[str, str]) -> _Names:
    names = _names(environment)
    if names is None:
        raise InputError(
            f"--cluster mpi requires the variables of mpirun: {', '.join(_OPEN_MPI)} (Open MPI) "
            f"or {', '.join(_HYDRA)} (MPICH, Intel MPI). Received: an environment without them. "
            "Start the launcher by mpirun, or leave --cluster out."
        )
    return names


def _manager(environment: Mapping[str, str], names: _Names) -> str:
    if names is _OPEN_MPI:
        return "mpirun (Open MPI)"
    intel = any(name.startswith("I_MPI_") for name in environment)
    return f"mpiexec ({'Intel MPI' if intel else 'MPICH'})"


def _nodes(
    environment: Mapping[str, str],
    manager: str,
    hosts: Sequence[str] | None,
    host_name: str,
    node_of: tuple[int, ...],
    rank: int,
) -> tuple[str, ...]:
    """The name of each node.

    Raises:
        InputError: nothing tells them, or this one is not where it must be.
    """
    count = node_of[-1] + 1
    if hosts is not None:
        return tuple(hosts)  # the settings' own check sees to their number
    if count == 1:
        return ("127.0.0.1",)
    if "SLURM_JOB_NODELIST" not in environment:
        raise InputError(
            f"{manager} on {count} nodes requires their names, which its environment does not "
            "tell. Received: neither --hosts nor a job of Slurm. Give --hosts a:port,b:port, one "
            "a node, in the order of the ranks."
        )
    nodes = slurm.node_names(environment["SLURM_JOB_NODELIST"])
    own = environment.get("MPIR_CVAR_CH3_INTERFACE_HOSTNAME")  # Hydra's word for this node
    if own is None:
        # Hydra hands the first node's SLURMD_NODENAME on to all of them.
        is_open_mpi = _names(environment) is _OPEN_MPI
        own = environment.get("SLURMD_NODENAME", host_name) if is_open_mpi else host_name
    supposed = nodes[node_of[rank]] if count <= len(nodes) else "a node that the job has not"
    if own.split(".")[0] != supposed.split(".")[0]:
        raise InputError(
            f"{manager} in a job of Slurm requires ranks that fill the job's nodes in their order, "
            f"by which rank {rank} is on {supposed}. Received: it is on {own}. Give --hosts "
            "a:port,b:port, one a node, in the order of the ranks, or start the launchers by srun."
        )
    return nodes[:count]


def _block(environment: Mapping[str, str], names: _Names) -> int:
    """By the name of this mpirun's processes; Hydra gives none: by Slurm's job, or the first."""
    own = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
    if names is _OPEN_MPI and own:
        return block_of(zlib.crc32(own.encode()))
    if environment.get("SLURM_JOB_ID"):
        # Not by the step: where Hydra starts its own, the first node's ranks may be in none.
        return slurm.job_block({"SLURM_JOB_ID": environment["SLURM_JOB_ID"]})
    return 0


def _own_cores(
    environment: Mapping[str, str], cores: int, machine_cores: int, local_size: int
) -> int:
    """An equal share; where each rank is bound to some already, those, unless others have them too.

    As those of a whole socket. Open MPI says that it has bound them also where it could not.
    """
    is_bound = environment.get("OMPI_MCA_orte_bound_at_launch") == "1" or (
        "I_MPI_PIN_INFO" in environment
    )
    if is_bound and cores < machine_cores:
        return max(1, min(cores, machine_cores // local_size))
    return max(1, cores // local_size)
