"""Several workers for anyone: start them, watch them, end them, start them again.

It stands on the standard library alone: it imports no framework and none of syncbn but its errors.

spec.py         ClusterSpec: who takes part, and the environment that tells each worker. Pure.
resources.py    cores and accelerators shared between the workers of a machine
settings.py     what a launch is asked to do
tasks.py        one task of a process manager's. Pure.
slurm.py        by srun's environment. Pure.
mpi.py          by mpirun's. Pure.
clusters.py     which of them it is, and their workers. Pure.
front.py        launch(): starts the supervisor, hands it signals, outlives it
supervisor.py   the process above the workers: groups, one after another
group.py        one group: from its start to its end
worker.py       one worker's process: started, read, ended
arrival.py      who is listening at its address
output.py       what of the workers' output is shown, and how
isolation.py    a network of their own
reaping.py      nothing that a worker started survives
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from syncbn.errors import InputError
from syncbn.launch.settings import LaunchSettings
from syncbn.launch.spec import ClusterSpec

if TYPE_CHECKING:
    from syncbn.launch.front import launch

__all__ = ["ClusterSpec", "LaunchSettings", "launch"]


def __getattr__(name: str) -> Any:
    """`launch` alone needs what Windows has not; the other commands and every help go without."""
    if name != "launch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if os.name != "posix":
        raise InputError(
            f"syncbn launch requires Linux or macOS. Received: {sys.platform}. Run it there."
        )
    from syncbn.launch.front import launch

    return launch
