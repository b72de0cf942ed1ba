"""Prints the table: `python -m tests.scenarios [--core] [--worlds …] [--without …]`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.scenarios.compare import judge
from tests.scenarios.drive import drive
from tests.scenarios.results import TRACEBACK
from tests.scenarios.scenario import load_table, select
from tests.scenarios.world import REFERENCE, WORLDS


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.scenarios", description=__doc__)
    parser.add_argument("--core", action="store_true", help="those of `make test` alone")
    parser.add_argument("--only", type=_names, default=[], help="names of scenarios, by commas")
    parser.add_argument(
        "--worlds", type=_names, default=[w for w in WORLDS if w != REFERENCE], help="by commas"
    )
    parser.add_argument("--without", type=_names, default=[], help="repairs, by commas")
    parser.add_argument("--no-repairs", action="store_true", help="Keras as it is")
    parser.add_argument("--verbose", action="store_true", help="the tracebacks of errors too")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """The number of differences, at most 1 as an exit status is."""
    options = parse(arguments)
    table = load_table()
    only = [
        name for name in table if not options.only or {name, name.split("[")[0]} & {*options.only}
    ]
    optimized = not options.core
    jobs = select(REFERENCE, core=options.core, only=only)
    reference = drive(REFERENCE, jobs, optimized=optimized)
    wrong = total = 0
    for world in options.worlds:
        started = time.monotonic()
        jobs = select(world, core=options.core, only=only)
        found = drive(
            world,
            jobs,
            without=options.without,
            repaired=not options.no_repairs,
            optimized=optimized,
        )
        for job in jobs:
            verdict = judge(job, world, found[job], reference[job][0])
            total += 1
            wrong += not verdict.same
            mark = " " if verdict.same else "✗"
            print(f"{mark} {world:12} {job:44} {verdict.words}", flush=True)
            if options.verbose and not verdict.same:
                for one in found[job]:
                    print(str(one.get(TRACEBACK, "")))
        print(f"  {world}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"{total} comparisons, {wrong} of them wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
