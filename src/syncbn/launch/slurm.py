"""A task of a Slurm step, by the environment that `srun` gives it: pure.

References:
    SchedMD, "srun" and "sbatch", sections "OUTPUT ENVIRONMENT VARIABLES"; Slurm's own environments,
    recorded with version 22.05, in tests/unit/environments.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from syncbn.errors import InputError
from syncbn.launch.resources import visible_gpus
from syncbn.launch.tasks import Task, block_of, number

__all__ = ["find", "is_step", "job_block", "node_names", "size", "tasks_per_node"]

# Numbers of steps that are none of srun's tasks: an interactive shell, the batch script, ….
_SPECIAL_STEPS = 0xFFFFFFF0
_MOST = 1 << 16  # nodes, or tasks
_LISTED = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?", re.ASCII)


def is_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script has a job but no step, as salloc's shell.

    An interactive shell has a step of a number that srun gives to no program.
    """
    step = _step(environment)
    if step is None or "SLURM_PROCID" not in environment:
        return False
    return not (step.isdigit() and int(step) >= _SPECIAL_STEPS)


def size(environment: Mapping[str, str]) -> int:
    """How many tasks the step has; the job, of which SLURM_NTASKS may speak, may have more."""
    own = "SLURM_STEP_NUM_TASKS" in environment
    return number(environment, "SLURM_STEP_NUM_TASKS" if own else "SLURM_NTASKS", 1)


def find(environment: Mapping[str, str], cores: int) -> Task:
    """The task that this process is.

    Args:
        environment: this process's.
        cores: those that this process may use.

    Raises:
        InputError: the environment contradicts itself, or does not tell which task is where.
    """
    count = size(environment)
    rank = number(environment, "SLURM_PROCID")
    name = f"srun step {environment.get('SLURM_JOB_ID', '?')}.{_step(environment)}"
    if rank >= count:
        _contradict(name, f"SLURM_PROCID={rank} of {count} tasks")
    nodes = node_names(environment.get("SLURM_STEP_NODELIST", ""))
    counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(counts) != len(nodes) or sum(counts) != count:
        _contradict(
            name,
            f"{count} tasks, SLURM_STEP_TASKS_PER_NODE={','.join(map(str, counts))} on the "
            f"{len(nodes)} node(s) {_shortened(nodes)}",
        )
    node_of = _layout(environment, name, counts)
    _check_own_node(environment, name, rank, node_of)
    local = counts[node_of[rank]]
    return Task(
        manager=name,
        rank=rank,
        nodes=nodes if len(nodes) > 1 else ("127.0.0.1",),
        node_of=node_of,
        block=job_block(environment),
        cores=_own_cores(environment, cores, local),
        has_own_gpus=_has_own_gpus(environment),
    )


def job_block(environment: Mapping[str, str]) -> int:
    """The block of ports of a step: (16 · job + step) modulo the number of blocks."""
    step = _step(environment) or "0"
    own = int(step) if step.isdigit() else 0
    return block_of(16 * number(environment, "SLURM_JOB_ID") + own)


def node_names(text: str) -> tuple[str, ...]:
    """The nodes of a list as Slurm writes it: "n[01-03,7],login1" are n01, n02, n03, n7, login1.

    Raises:
        InputError: it is no such list.
    """
    try:
        parts = list(_parts(text))
        names = tuple(name for part in parts for name in _expanded(part))
        if names and len({*names}) == len(names) <= _MOST:
            return names
    except ValueError:
        pass
    raise InputError(
        "A list of Slurm's nodes requires distinct names and ranges, as n[01-03,7],login1. "
        f"Received: {text!r}. Start the program by srun, or give --cluster none."
    )


def tasks_per_node(text: str) -> tuple[int, ...]:
    """The tasks of each node of "2(x3),1": 2, 2, 2, 1.

    Raises:
        InputError: it is no such list.
    """
    matches = [_COUNT.fullmatch(part) for part in text.split(",")]
    counts = [(int(found[1]), int(found[2] or 1)) for found in matches if found]
    whole = len(counts) == len(matches)
    if not whole or any(own < 1 or not 1 <= times <= _MOST for own, times in counts):
        raise InputError(
            "SLURM_STEP_TASKS_PER_NODE requires counts, as 2(x3),1. "
            f"Received: {text!r}. Start the program by srun, or give --cluster none."
        )
    return tuple(own for own, times in counts for _ in range(times))


def _step(environment: Mapping[str, str]) -> str | None:
    return environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID"))


def _parts(text: str) -> Iterator[str]:
    """What stands between the commas that are in no brackets."""
    position = 0
    while found := _LISTED.match(text, position):
        yield found[0]
        position = found.end() + 1
        if found.end() == len(text):
            return
        if text[found.end()] != ",":
            break
    raise ValueError(text)


def _expanded(part: str) -> Iterator[str]:
    """The names of "rack[0-1]n[01-02]", the last bracket running fastest."""
    pieces = re.split(r"\[([^\[\]]*)\]", part)
    choices = [list(_numbers(piece)) if odd % 2 else [piece] for odd, piece in enumerate(pieces)]
    for chosen in itertools.islice(itertools.product(*choices), _MOST + 1):
        yield "".join(chosen)


def _numbers(ranges: str) -> Iterator[str]:
    """Those of "01-03,7", with their zeros."""
    for part in ranges.split(","):
        found = _RANGE.fullmatch(part)
        if found is None:
            raise ValueError(part)
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < first + _MOST:
            raise ValueError(part)
        yield from (f"{value:0{len(found[1])}}" for value in range(first, last + 1))


def _layout(environment: Mapping[str, str], name: str, counts: Sequence[int]) -> tuple[int, ...]:
    """The node of each task, by the way in which srun shared them out.

    Raises:
        InputError: in a way that the environment does not tell.
    """
    if len(counts) == 1:
        return (0,) * counts[0]
    told = environment.get("SLURM_DISTRIBUTION", "block")
    # "cyclic:block,Pack": the others are of cores within a node.
    across = re.split("[:,]", told.lower())[0]
    at_once = {"block": max(counts), "*": max(counts), "cyclic": 1}.get(across)
    if across == "plane":
        at_once = number(environment, "SLURM_DIST_PLANESIZE", 1)
    if at_once is None:
        raise InputError(
            f"{name} requires tasks that are shared out by block, cyclic or plane, from which "
            f"follows where each is. Received: SLURM_DISTRIBUTION={told!r}. Give srun "
            "--distribution=block, or the launcher --hosts and --index."
        )
    left, node_of, node = list(counts), [], 0
    while any(left):
        given = min(at_once, left[node])
        node_of += [node] * given
        left[node] -= given
        node = (node + 1) % len(counts)
    return tuple(node_of)


def _check_own_node(
    environment: Mapping[str, str], name: str, rank: int, node_of: tuple[int, ...]
) -> None:
    """Every task checks its own node: what they all suppose is true, or one says so.

    Raises:
        InputError: Slurm says otherwise of this node.
    """
    own = [other for other, node in enumerate(node_of) if node == node_of[rank]]
    supposed = {
        "SLURM_NODEID": str(node_of[rank]),
        "SLURM_LOCALID": str(own.index(rank)),
        "SLURM_GTIDS": ",".join(map(str, own)),
    }
    for variable, value in supposed.items():
        told = environment.get(variable, value)
        if told != value:
            raise InputError(
                f"{name} requires tasks that are shared out as SLURM_DISTRIBUTION says (here "
                f"{environment.get('SLURM_DISTRIBUTION', 'block')!r}), by which task {rank} has "
                f"{variable}={value}. Received: {told!r}. Give srun --distribution=block, or the "
                "launcher --hosts and --index."
            )


def _own_cores(environment: Mapping[str, str], cores: int, local: int) -> int:
    """By --cpus-per-task; else a share of the step's on this node, as far as the task is bound."""
    if environment.get("SLURM_CPUS_PER_TASK"):
        return min(cores, number(environment, "SLURM_CPUS_PER_TASK", 1))
    if environment.get("SLURM_CPUS_ON_NODE"):
        return max(1, min(cores, number(environment, "SLURM_CPUS_ON_NODE", 1) // local))
    return max(1, cores // local)


def _has_own_gpus(environment: Mapping[str, str]) -> bool:
    """Whether srun has shared out the node's GPUs itself, by --gpus-per-task or --gpu-bind."""
    if not environment.get("SLURM_GPUS_ON_NODE") or "CUDA_VISIBLE_DEVICES" not in environment:
        return False
    return len(visible_gpus(environment)) < number(environment, "SLURM_GPUS_ON_NODE")


def _shortened(nodes: Sequence[str]) -> str:
    return ", ".join([*nodes[:4], "…"] if len(nodes) > 4 else nodes)


def _contradict(name: str, received: str) -> NoReturn:
    raise InputError(
        f"{name} requires an environment whose numbers agree. Received: {received}. Start the "
        "program by srun itself, without SLURM_… variables of your own, or give --cluster none."
    )
