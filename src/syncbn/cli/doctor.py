"""`syncbn doctor`: whether synchronized batch normalization is available here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from syncbn.errors import InputError

__all__ = ["add_parser"]

_DESCRIPTION = """\
Answer whether synchronized batch normalization is available here, and try it: a step on two
replicas with data of their own, in a process of its own, of plain BatchNormalization, of the
synchronized one that this version has, and of syncbn's. Also look at TF_CONFIG and the like, call
the other workers, and say what is known to be wrong with these versions.

It runs where TensorFlow is missing, broken or slow. With --tensorflow it answers for that version
by the table of versions, and tries nothing:

  syncbn doctor
  syncbn doctor --tensorflow 2.9
  syncbn doctor --tensorflow 2.18 --keras 3.6

The exit code is 0 if it is available and works, 1 if it is not or does not, 2 if that cannot be
told.
"""


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "doctor",
        help="say whether synchronized batch normalization is available here, and works",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tensorflow", metavar="VERSION", help="answer for this TensorFlow, by the table alone")
    add(
        "--keras", metavar="VERSION", help="with --tensorflow: and this Keras (default: the newest)"
    )
    add(
        "--legacy",
        action="store_true",
        help="with --tensorflow: and Keras 2, by TF_USE_LEGACY_KERAS=1",
    )
    add(
        "--backend",
        choices=("jax", "tensorflow", "torch"),
        help="what Keras is to run on (default: what it does here)",
    )
    add(
        "--timeout",
        type=float,
        default=180.0,
        metavar="SECONDS",
        help="how long the framework may take to be imported and tried (default: 180)",
    )
    add(
        "--peers-timeout",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="how long each of the other workers has to answer (default: 2)",
    )
    add("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ask the table, or this machine; print the report."""
    from syncbn import doctor
    from syncbn.doctor.text import text_of

    if arguments.tensorflow is not None:
        if arguments.backend is not None:
            raise InputError(
                "--tensorflow requires to be alone, or with --keras or --legacy. Received: "
                f"--backend {arguments.backend} too. Leave one of them out."
            )
        report = doctor.of_versions(arguments.tensorflow, arguments.keras, arguments.legacy)
    elif arguments.keras is not None or arguments.legacy:
        raise InputError(
            "--keras and --legacy require --tensorflow. Received: none. Add it, as --tensorflow "
            "2.18."
        )
    else:
        with _Progress() as progress:
            report = doctor.diagnose(
                arguments.timeout, arguments.backend, arguments.peers_timeout, progress
            )
    try:
        print(json.dumps(report.as_dict(), indent=2) if arguments.json else text_of(report))
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough; Python would complain of it once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return report.exit_code


class _Progress:
    """One line on stderr, rewritten on a terminal; elsewhere only what takes long is said."""

    def __init__(self) -> None:
        self._moves = sys.stderr.isatty()

    def __enter__(self) -> Callable[[str], None]:
        self._show("looking at this machine; a framework is tried in a process of its own")
        return self._tell

    def _tell(self, doing: str) -> None:
        if self._moves or doing.startswith("import"):
            self._show(doing)

    def _show(self, doing: str) -> None:
        end = "" if self._moves else "\n"
        start = "\r\x1b[K" if self._moves else ""
        print(f"{start}syncbn doctor: {doing} ...", end=end, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._moves:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
