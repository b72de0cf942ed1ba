"""Several workers for anyone: start them, watch them, end them, start them again.

It stands on the standard library alone: it imports no framework and none of syncbn but its errors.

spec.py         ClusterSpec: who takes part, and the environment that tells each worker. Pure.
resources.py    cores and accelerators shared between the workers of a machine
settings.py     what a launch is asked to do
front.py        launch(): starts the supervisor, hands it signals, outlives it
supervisor.py   the process above the workers: groups, one after another
group.py        one group: from its start to its end
worker.py       one worker's process: started, read, ended
arrival.py      who is listening at its address
output.py       what of the workers' output is shown, and how
isolation.py    a network of their own
reaping.py      nothing that a worker started survives
"""

from syncbn.launch.front import launch
from syncbn.launch.settings import LaunchSettings
from syncbn.launch.spec import ClusterSpec

__all__ = ["ClusterSpec", "LaunchSettings", "launch"]
