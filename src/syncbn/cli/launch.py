"""`syncbn launch`: several workers for anyone."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from syncbn.errors import InputError
from syncbn.launch import LaunchSettings
from syncbn.launch.clusters import detected
from syncbn.launch.settings import CLUSTERS

__all__ = ["add_cluster_options", "add_parser", "cluster_settings"]

_DESCRIPTION = """\
Run a program as several workers on this machine, or on several, and see them to their end.

Each worker gets TF_CONFIG (TensorFlow), KERAS_DISTRIBUTION_* (JAX), and RANK, WORLD_SIZE, ...
(torch). The first worker that fails ends the others, and its exit code is the launcher's. Ctrl-C
ends all.

  syncbn launch --workers 4 train.py --epochs 3
  syncbn launch --workers 2 --max-restarts 3 -m my_package.train
  syncbn launch --hosts 10.0.0.1:4000,10.0.0.2:4000 --index 0 train.py    (on 10.0.0.1)
  srun --ntasks 8 syncbn launch train.py                                  (within a job of Slurm)
  mpirun -n 4 syncbn launch train.py

Started by srun or mpirun as one of several tasks, each launcher starts one worker, or --workers,
and all tasks are one cluster. --index, or --cluster none, takes precedence over what they say.
"""


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "launch",
        help="run a program as several workers, and see them to their end",
        description=_DESCRIPTION,
        usage="syncbn launch [OPTIONS] (FILE.py | -m MODULE) [ARGUMENTS]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # One with all that follows: of two argparse would take a -- of the program's for its own.
    add(
        "program",
        nargs=argparse.PARSER,
        metavar="FILE.py",
        help="the program, as `python FILE.py` would run it, and its own arguments",
    )
    add("-m", "--module", action="store_true", help="the program is a module: `python -m MODULE`")
    add_cluster_options(add)
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start the whole group again after a failure, at most so often; "
        "keras.callbacks.BackupAndRestore resumes (default: 0)",
    )
    parser.set_defaults(run=run)


def add_cluster_options(add: Callable[..., Any]) -> None:
    """The options of every command that starts workers."""
    _add_places(add)
    add(
        "--devices-per-worker",
        type=int,
        metavar="N",
        help="GPUs of each worker (default: an equal share of this machine's); without GPUs "
        "virtual CPU devices (default: 1)",
    )
    add(
        "--backend",
        choices=("tensorflow", "jax", "torch"),
        help="sets KERAS_BACKEND (default: what Keras would take)",
    )
    add(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds that a worker may be missing, at the start and, with "
        "syncbn.enable_multi_worker(), in training (default: 120)",
    )
    add(
        "--grace",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds between SIGTERM and SIGKILL (default: 5); TensorFlow's and JAX's workers do "
        "not end by SIGTERM",
    )
    add("--log-dir", metavar="DIR", help="also append each worker's output to DIR/worker-N.log")
    add(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        help="give the workers a network of their own, which nothing outside reaches and which "
        "reaches nothing outside (default: where the kernel allows it, for one launcher)",
    )


def _add_places(add: Callable[..., Any]) -> None:
    """How many workers, and where."""
    add(
        "--workers",
        type=int,
        metavar="N",
        help="workers on this machine (default: 2), on each of the --hosts (default: 1), or of "
        "each task of srun or mpirun (default: 1)",
    )
    add(
        "--hosts",
        metavar="A:PORT,B:PORT",
        help="several machines: run the launcher on each. Their workers take the port and those "
        "after it; the first host keeps one more, for JAX and torch. With srun or mpirun: one a "
        "node, in the order of the tasks, without --index",
    )
    add("--index", type=int, metavar="I", help="which of the --hosts this machine is, from 0")
    add(
        "--cluster",
        choices=("auto", *CLUSTERS),
        default="auto",
        help="whose task the launcher is: Slurm's (srun), MPI's (mpirun), or none's (default: by "
        "the environment; none with --index, and for the only task)",
    )
    add(
        "--port",
        type=int,
        metavar="P",
        help="with srun or mpirun: the first port of the workers on each node (default: by the "
        "number of the job)",
    )


def cluster_settings(arguments: argparse.Namespace) -> LaunchSettings:
    """The settings by those options, as far as the command has them."""
    names = {field.name for field in dataclasses.fields(LaunchSettings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if given.get("cluster") == "auto":
        is_told = given.get("index") is not None
        given["cluster"] = "none" if is_told else detected(os.environ)
    if given.get("workers") is None:
        given["workers"] = 1 if given.get("hosts") or given.get("cluster", "none") != "none" else 2
    return LaunchSettings(**given)


def run(arguments: argparse.Namespace) -> int:
    """Start the workers; the exit code is theirs."""
    from syncbn.launch import launch

    settings = cluster_settings(arguments)
    settings.check()
    return launch(_command(arguments), settings)


def _command(arguments: argparse.Namespace) -> list[str]:
    given = arguments.program
    program, *own = given[1:] if given[0] == "--" and len(given) > 1 else given
    if arguments.module:
        return [sys.executable, "-m", program, *own]
    if not Path(program).is_file():
        raise InputError(
            "syncbn launch requires a Python file, or a module after -m. Received: "
            f"{program!r}, which is not a file. Check the path, or add -m."
        )
    # Python would take -x.py for an option.
    return [sys.executable, f"./{program}" if program.startswith("-") else program, *own]
