"""Runs scenarios in one world in this process, which for workers is one of them.

    python -m tests.scenarios.runner WORLD FOLDER [--only JOBS] [--without REPAIRS]

A job is a scenario, or `SCENARIO@REPAIR`: that scenario without that repair. Each result is a file
of FOLDER as soon as it is there, so that what ends the process (a hang, a crash) costs one job;
`tests.scenarios.drive` starts the rest anew.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

import syncbn
from tests.scenarios.results import error_array, result_path, started_path, write
from tests.scenarios.scenario import SCENARIOS, Scenario, select
from tests.scenarios.world import REFERENCE, World, make_world

# The exit status of a worker that has failed: its peer's collectives are of no more use.
BROKEN = 3


def run(job: str, world: World, repairs: Any) -> bool:
    """Run one job and write what it gave; whether this process can go on.

    Args:
        job: its name.
        world: where; its folder is that of the results.
        repairs: the context in which it runs.
    """
    entry = SCENARIOS[job.split("@")[0]]
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    scratch = world.folder / f"scratch.{job}"
    scratch.mkdir(exist_ok=True)
    started_path(world.folder, job, world.worker).touch()
    own = dataclasses.replace(world, folder=scratch)
    survives = True
    faulthandler.dump_traceback_later(entry.seconds, exit=True)
    try:
        with repairs:
            observed = entry.observe(own)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        # The type that users know: a private one is a detail of its base.
        kind = next(one.__name__ for one in type(error).__mro__ if one.__name__[0] != "_")
        observed = error_array(kind, str(error), traceback.format_exc())
        survives = _all_failed(entry, own, error) and not entry.breaks
    finally:
        faulthandler.cancel_dump_traceback_later()
    write(world.folder, job, world.worker, observed)
    return survives


def _all_failed(entry: Scenario, world: World, error: Exception) -> bool:
    """Whether every worker fails alike, outside of TensorFlow: none is left in a collective."""
    if isinstance(error, tf.errors.OpError) and world.workers > 1:
        return False
    try:
        world.wait_for_workers("failure", seconds=20.0 if entry.breaks else 3.0)
    except TimeoutError:
        return False
    return True


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="names of jobs, by commas")
    parser.add_argument("--without", default="", help="names of repairs, by commas")
    parser.add_argument("--no-repairs", action="store_true")
    parser.add_argument("--not-optimized", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.not_optimized:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    world = make_world(options.world, options.folder)
    left_out = {name for name in options.without.split(",") if name}
    only = [name for name in options.only.split(",") if name]
    for job in select(options.world, only=only):
        if result_path(options.folder, job, world.worker).exists():
            continue
        if options.no_repairs or options.world == REFERENCE:
            repairs: Any = contextlib.nullcontext()
        else:
            entry = SCENARIOS[job.split("@")[0]]
            without = left_out | set(job.split("@")[1:])
            repairs = syncbn.enable_multi_worker(without=without, timeout=entry.timeout)
        if not run(job, world, repairs):
            return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
