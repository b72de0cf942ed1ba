"""`syncbn convert`: the layers of a model in a file, synchronized or plain."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from syncbn.cli.start import FRAMEWORKS, start_framework
from syncbn.errors import InputError

__all__ = ["add_parser"]

_DESCRIPTION = """\
Read the model in IN, make every BatchNormalization in it a SyncBatchNormalization, or with --revert
the reverse, and write it to OUT, with its weights, loss, metrics and optimizer. A reverted file
opens where syncbn is not installed.

Files are .keras or .h5, of Keras 3, or of Keras 2 where Keras 3 can read them. OUT is written
whole or not at all, after the new file has been opened once to see that it gives back the model.
"""


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "convert",
        help="make the batch normalization of a model in a file synchronized, or plain again",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="IN", help="the model, a .keras or .h5 file")
    add("output", type=Path, metavar="OUT", nargs="?", help="the file to write; not with --plan")
    add("--revert", action="store_true", help="make synchronized layers Keras's again")
    add("--plan", action="store_true", help="say what would be done to each layer; write nothing")
    add("--json", action="store_true", help="print what is done, or the plan, as JSON")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of every new layer, as group_size=2; may be given several times",
    )
    add("--force", action="store_true", help="replace OUT where it is there")
    add(
        "--unsafe",
        action="store_true",
        help="run code that the file holds (Lambda layers): only for files that you trust",
    )
    add(
        "--without-training",
        action="store_true",
        help="leave out loss, metrics and optimizer, as where they are your own classes",
    )
    add("--backend", choices=sorted(FRAMEWORKS), help="default: KERAS_BACKEND, or tensorflow")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check all that can be checked, then convert."""
    settings = dict(map(_setting, arguments.set))
    if arguments.plan == (arguments.output is not None):
        raise InputError(
            "syncbn convert requires OUT, or --plan in its place. Received: "
            f"{'both' if arguments.plan else 'neither'}. Give one of them."
        )
    start_framework("convert", arguments.backend or os.environ.get("KERAS_BACKEND") or "tensorflow")
    import syncbn
    from syncbn.conversion import files

    if arguments.output is not None:
        files.checked_output(arguments.output, arguments.force)
    model = files.opened(
        arguments.model, unsafe=arguments.unsafe, with_training=not arguments.without_training
    )
    plan = syncbn.plan_conversion(model, to_plain=arguments.revert, **settings)
    if arguments.output is not None:
        change = syncbn.revert if arguments.revert else syncbn.convert
        change(model, verbose=False, **settings)
        files.write(model, arguments.output)
    _say(plan, arguments)
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """`name=value`, where the value is a number, true, false, null, a list, or else a string."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise InputError(
            f"--set requires NAME=VALUE. Received: {text!r}. Write it as group_size=2."
        )
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _say(plan: Any, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(plan.as_dict(), indent=2))
        return
    if arguments.plan:
        for one in plan.replaced:
            lost = "".join(f"  without {name}={value!r}" for name, value in one.lost.items())
            print(f"{one.path}  {one.old_class} -> {one.new_class}{lost}")
        for one in plan.left:
            print(f"{one.path}  {one.old_class} left: {one.reason}")
    print(plan)
