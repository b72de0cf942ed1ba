"""`syncbn bench`: what synchronizing costs on these devices, and whether it is worth it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncbn.bench.settings import SHAPES, BenchSettings, parse_shape
from syncbn.cli.interrupt import Flag, stop_flag
from syncbn.cli.start import start_framework

if TYPE_CHECKING:
    from syncbn.bench.short import ShortBenchmark

__all__ = ["add_parser"]

_DESCRIPTION = """\
Measure what synchronizing costs on this machine: one layer against Keras's own and against local
statistics, then a whole step of training. The last sentence says whether it is worth it. All
visible GPUs are the replicas where there are at least two, else virtual CPU devices.
"""


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="measure what synchronizing costs on this machine, and say whether it is worth it",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    defaults = BenchSettings()
    shapes = " ".join(",".join(map(str, shape)) for shape in SHAPES)
    add(
        "--shape",
        action="append",
        metavar="N,...,C",
        help="inputs of the layer on each replica, batch first and channels last; may be given "
        f"several times (default: {shapes})",
    )
    add(
        "--replicas",
        type=int,
        metavar="N",
        help="GPUs, or virtual CPU devices where there are fewer (default: all GPUs, or 2)",
    )
    add(
        "--rounds",
        type=int,
        default=defaults.rounds,
        metavar="N",
        help="in which the variants take turns (default: %(default)s)",
    )
    add(
        "--batch",
        type=int,
        default=defaults.batch,
        metavar="N",
        help="images of the training step on each replica (default: %(default)s)",
    )
    add(
        "--image",
        type=int,
        default=defaults.image,
        metavar="PIXELS",
        help="height and width of these images (default: %(default)s)",
    )
    add("--output", type=Path, metavar="FILE.json", help="write all figures and samples here")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked first, then measure."""
    shapes = tuple(parse_shape(text) for text in arguments.shape or ())
    settings = BenchSettings(
        shapes=shapes or SHAPES,
        replicas=arguments.replicas,
        rounds=arguments.rounds,
        batch=arguments.batch,
        image=arguments.image,
        output=arguments.output,
    )
    settings.check()
    with stop_flag() as flag:
        start_framework("bench", "tensorflow")
        return _measure_and_print(settings, flag)


def _measure_and_print(settings: BenchSettings, flag: Flag) -> int:
    from syncbn.bench import text
    from syncbn.bench.short import ShortBenchmark, verdict_of

    def stop() -> None:
        if flag.raised:
            raise KeyboardInterrupt

    benchmark = ShortBenchmark(settings, stop)
    _print_head(benchmark, text.wrapped(text.LEGEND))
    layers = []
    for result in benchmark.layers():
        layers.append(result)
        print("", *text.layer_lines(result), sep="\n", flush=True)
    training = benchmark.training()
    print("", *text.training_lines(training), "", sep="\n")
    benchmark.write(layers, training)
    verdict = verdict_of(training)
    for remark in (*verdict.remarks, verdict.sentence):
        print(text.wrapped(remark))
    return 0


def _print_head(benchmark: ShortBenchmark, legend: str) -> None:
    from syncbn.bench.machine import describe

    of = describe()
    print(
        f"syncbn {of['syncbn']}, TensorFlow {of['tensorflow']}, Keras {of['keras']}, {of['cores']} "
        f"cores of {of['cpu'] or of['architecture']}, {benchmark.replicas} replicas:"
    )
    for device in benchmark.devices:
        print(f"  {device}")
    if benchmark.lone_gpu:
        print(
            "This machine has one GPU, on which nothing needs to be synchronized. The figures are "
            "of virtual CPU devices,\nand say nothing about training on several GPUs."
        )
    print(legend, flush=True)
