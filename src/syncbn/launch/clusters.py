"""Which cluster this launcher is of: that of the process manager that started it, or none."""

from __future__ import annotations

from collections.abc import Mapping

from syncbn.errors import InputError
from syncbn.launch import mpi, slurm
from syncbn.launch.settings import LaunchSettings
from syncbn.launch.spec import MARK, ClusterSpec, parse_hosts, split_address
from syncbn.launch.tasks import Task

__all__ = ["detected", "find_task", "spec_of"]


def detected(environment: Mapping[str, str]) -> str:
    """Who started this process as one of several: "slurm", "mpi" or "none".

    mpirun comes first: within a job of Slurm its ranks, or its daemons, are tasks of a step too. A
    manager's only task is on its own, as if nobody had started it, and so is a launcher within a
    worker: the task is that of the launcher which started the worker.

    Raises:
        InputError: a count in the environment is no number.
    """
    if MARK in environment:
        return "none"
    if mpi.is_rank(environment):
        return "mpi" if mpi.size(environment) > 1 else "none"
    if slurm.is_step(environment):
        return "slurm" if slurm.size(environment) > 1 else "none"
    return "none"


def find_task(
    environment: Mapping[str, str],
    settings: LaunchSettings,
    cores: int,
    machine_cores: int,
    host_name: str,
) -> Task | None:
    """This process as a task of the settings' cluster; None where they ask for none.

    Raises:
        InputError: it is no such task, or the environment does not tell which.
    """
    if settings.cluster == "none":
        return None
    if settings.cluster == "mpi":
        task = mpi.find(environment, cores, machine_cores, _host_names(settings), host_name)
    else:
        if not slurm.is_step(environment):
            raise InputError(
                "--cluster slurm requires a step of Slurm. Received: an environment without "
                "SLURM_STEP_ID and SLURM_PROCID. Start the launcher by srun, or leave --cluster "
                "out."
            )
        task = slurm.find(environment, cores)
    if settings.hosts is not None:
        given = parse_hosts(settings.hosts, task.local_size * settings.workers)
        nodes = max(task.node_of) + 1
        if len(given) != nodes:
            raise InputError(
                f"{task.manager} runs on {nodes} node(s), and --hosts requires one address of "
                f"each, in the order of the ranks. Received: {len(given)}, {settings.hosts!r}. "
                "Give as many, or leave --hosts out."
            )
    return task


def spec_of(task: Task, settings: LaunchSettings) -> ClusterSpec:
    """All workers of the tasks, `settings.workers` of each.

    Raises:
        InputError: there are too few ports.
    """
    if settings.hosts is not None:
        places = [split_address(host.strip()) for host in settings.hosts.split(",")]
    else:
        places = task.places(settings.port, settings.workers)
    machines = [node for node in task.node_of for _ in range(settings.workers)]
    return ClusterSpec.on_machines(places, machines)


def _host_names(settings: LaunchSettings) -> tuple[str, ...] | None:
    if settings.hosts is None:
        return None
    return tuple(split_address(host.strip())[0] for host in settings.hosts.split(","))
