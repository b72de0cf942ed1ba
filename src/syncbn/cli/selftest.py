"""`syncbn selftest`: the proof, on the user's own machines."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import Any

from syncbn.cli.launch import add_cluster_options, cluster_settings
from syncbn.launch import LaunchSettings

__all__ = ["add_parser"]

_DESCRIPTION = """\
Train on several workers and compare with NumPy in float64, which shares no code with the library:

  layer   SyncBatchNormalization in strategy.run, unequal and empty batches, large means
  fit     Keras's fit, with a last batch that does not divide
  uneven  workers with unequal numbers of batches
  soak    memory, threads and open files over many steps
  resume  a worker that is killed; the group is started again, to the same bytes

The exit code is 0 only if all of them passed on all workers. Tasks of srun and ranks of mpirun are
one cluster's workers. Where something else starts the workers (Kubernetes), run
`python -m syncbn.selftest` as each of them.
"""


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "selftest",
        help="show that training on this machine's or cluster's workers gives what NumPy gives",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", metavar="NAMES", help="checks, by commas (default: all)")
    add("--steps", type=int, default=300, metavar="N", help="of the check soak (default: 300)")
    add_cluster_options(add)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Launch the workers, then the trainings of `resume`; 0 if everything passed."""
    from syncbn.launch import launch
    from syncbn.selftest.checks import RESUME, check_steps, selected

    check_steps(arguments.steps)
    checks = selected(arguments.only, RESUME)
    settings = cluster_settings(arguments)
    settings.check()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the table is what is to be read
    status = 0
    in_workers = [check.name for check in checks if check.name != RESUME.name]
    if in_workers:
        options = ["--only", ",".join(in_workers), "--steps", str(arguments.steps)]
        status = launch([sys.executable, "-m", "syncbn.selftest", *options], settings)
    if RESUME in checks:
        if settings.hosts is not None or settings.cluster != "none":
            print("resume  left out: it is for the workers of one machine", flush=True)
        else:
            status = _resume(settings) or status
    return status


def _resume(settings: LaunchSettings) -> int:
    from syncbn.selftest.checks import RESUME, lines
    from syncbn.selftest.resume import findings

    print("A worker is about to be killed, on purpose:", file=sys.stderr, flush=True)
    found = findings(dataclasses.replace(settings, quiet=True))
    passed = all(finding.holds for finding in found)
    print(lines(RESUME, [str(finding) for finding in found], passed), flush=True)
    return 0 if passed else 1
