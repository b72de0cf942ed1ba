"""`syncbn verify`: whether replicas train the user's model as one device does."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from syncbn.cli.quiet import without_start_notices
from syncbn.cli.start import FRAMEWORKS, start_framework
from syncbn.errors import InputError

__all__ = ["add_parser"]

_DESCRIPTION = """\
Train your model with its own fit on one device and on N replicas, on the same global batches, and
say whether they agree: outputs of every layer, gradients, weights, moving statistics, metrics; if
not, which layer departs first, and why.

MODEL is a function without arguments that returns a compiled model: module:function, or
path/to/file.py:function. Replicas are accelerators where there are enough, else virtual CPU
devices; with --workers, and on torch, processes.

Exit code 0: they agree. 1: they depart. 2: it cannot be told, or bad input.
"""


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "verify",
        help="prove that replicas train your model as one device does, or show where they depart",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="module:function, or file.py:function")
    add(
        "--data",
        required=True,
        metavar="FILE",
        help="an .npz file with x (or x_train), y, and sample_weight if there is one",
    )
    add("--replicas", type=int, default=2, metavar="N", help="default: 2")
    add("--workers", type=int, metavar="N", help="processes with a replica each, instead")
    add("--steps", type=int, default=5, metavar="N", help="of the optimizer (default: 5)")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="examples in the global batch (default: 32); the last batch has what an epoch leaves",
    )
    add(
        "--repair",
        action="store_true",
        help="have in the runs what syncbn has for training by fit: enable_multi_worker() on "
        "TensorFlow, distribute_dataset on JAX, average_gradients on torch",
    )
    add(
        "--without-random",
        action="store_true",
        help="have dropout, augmentation and the like in inference",
    )
    add("--backend", choices=sorted(FRAMEWORKS), help="default: KERAS_BACKEND, or tensorflow")
    add("--html", type=Path, metavar="FILE", help="write the report as one page with a picture")
    add(
        "--json", type=Path, metavar="FILE", help="write everything that was compared; - for stdout"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check all that can be checked, then verify and report."""
    from syncbn.verification.settings import VerifySettings

    settings = VerifySettings(
        replicas=arguments.replicas,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        repair=arguments.repair,
        hold_random=arguments.without_random,
    )
    settings.check()
    to_stdout = str(arguments.json) == "-"
    for option in ("html", "json"):
        path = getattr(arguments, option)
        if path is not None and str(path) != "-":
            _check_writable(f"--{option}", path)
    if not Path(arguments.data).is_file():
        raise InputError(
            f"--data requires an .npz file. Received: {arguments.data!r}, which is no file. Write "
            "one: numpy.savez(path, x=x, y=y)."
        )
    backend = arguments.backend or os.environ.get("KERAS_BACKEND") or "tensorflow"
    start_framework("verify", backend)
    from syncbn.verification import document, page, text
    from syncbn.verification.program import load_function
    from syncbn.verification.verifying import verified

    with os.fdopen(os.dup(2), "w") as terminal, without_start_notices():

        def say(what: str) -> None:
            print(f"syncbn verify: {arguments.model}: {what}", file=terminal, flush=True)

        function = load_function(arguments.model)
        verdict = verified(function, arguments.data, settings, say)
    if arguments.html is not None:
        page.write_page(verdict, arguments.html)
    if to_stdout:
        print(json.dumps(document.as_dict(verdict), indent=2, allow_nan=False))
    else:
        if arguments.json is not None:
            document.write_json(verdict, arguments.json)
        text.show(verdict, sys.stdout)
    return int(verdict.exit_code)


def _check_writable(option: str, path: Path) -> None:
    """Before minutes are spent on it."""
    folder = path.resolve().parent
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            f"{option} requires a file in a folder that can be written to. Received: "
            f"{str(path)!r}. Give another path."
        )
