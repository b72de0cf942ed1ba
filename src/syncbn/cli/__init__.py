"""The command line. Starting it, and its help, import no framework."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

import syncbn

__all__ = ["main", "parser"]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, not under the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """What understands the arguments of `syncbn`."""
    from syncbn.cli import bench, convert, doctor, launch, selftest, train, verify

    whole = _Parser(
        prog="syncbn",
        description="Synchronized batch normalization for Keras 3: replicas train to what one "
        "device gives on the whole batch.",
    )
    whole.add_argument("--version", action="version", version=f"syncbn {syncbn.__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train.add_parser(commands)
    launch.add_parser(commands)
    selftest.add_parser(commands)
    bench.add_parser(commands)
    convert.add_parser(commands)
    doctor.add_parser(commands)
    verify.add_parser(commands)
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Run `syncbn` with these arguments, by default the process's, and return the exit code."""
    parsed = parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except syncbn.InputError as error:
        print(f"syncbn: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("syncbn: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
