"""`syncbn train`: train a classifier on replicas and show that it equals one device."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncbn.cli.interrupt import Flag, stop_flag
from syncbn.cli.quiet import without_start_notices
from syncbn.cli.start import FRAMEWORKS, start_framework
from syncbn.errors import InputError

if TYPE_CHECKING:
    from syncbn.training.job import Run
    from syncbn.training.settings import TrainSettings

__all__ = ["EXTRAS", "add_parser"]

EXTRAS = "train"

_PRECISIONS = ("float32", "float64", "mixed_bfloat16", "mixed_float16")
# The option that says how many, of each strategy.
_COUNTED_BY = {
    "mirrored": "--replicas",
    "multiworker": "--workers",
    "data_parallel": "--replicas",
    "none": None,
}


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a classifier on replicas and compare it with one device",
        description="Train a classifier of real images on several replicas, of one process or of "
        "several, with Keras on TensorFlow, JAX or torch. With --compare the "
        "same model, from the same weights on the same batches, is also trained on one device, "
        "with local statistics and with Keras's own synchronization, and a table says how far "
        "each is from one device. From one seed every backend starts from the same weights and "
        "takes the same batches. Writes model.keras, history.csv, table.json and curves.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        default="digits",
        metavar="digits|mnist|FILE.npz",
        help="digits: the real handwritten digits in scikit-learn; mnist: fetched by Keras, needs "
        "a network; FILE.npz: arrays x_train, y_train, x_test, y_test as in Keras's MNIST",
    )
    add("--model", choices=("mlp", "convnet"), default="mlp", help="the network")
    add(
        "--norm",
        choices=("sync", "local", "keras"),
        default="sync",
        help="sync: syncbn.SyncBatchNormalization; local: keras.layers.BatchNormalization (on JAX, "
        "where DataParallel makes that one global, syncbn's with group_size=1); keras: "
        "BatchNormalization with synchronized=True, on JAX without, on torch there is none",
    )
    _add_training_options(add)
    parser.set_defaults(run=run)


def _add_training_options(add: Callable[..., Any]) -> None:
    # Without a default, to see whether they were given.
    add(
        "--backend",
        choices=tuple(FRAMEWORKS),
        default=argparse.SUPPRESS,
        help="Keras's (default: KERAS_BACKEND, else tensorflow)",
    )
    add(
        "--strategy",
        choices=tuple(_COUNTED_BY),
        default=argparse.SUPPRESS,
        help="mirrored: replicas in step, in one process; multiworker: worker processes in step, "
        "on this machine, both on tensorflow; data_parallel: replicas in step, on jax the devices "
        "of one process, on torch processes; none: one device (default: mirrored on tensorflow, "
        "else data_parallel)",
    )
    add(
        "--replicas",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="of --strategy mirrored and data_parallel: devices, on torch processes; virtual CPU "
        "devices where there are fewer accelerators (default: 2)",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="of --strategy multiworker: processes, with a device each (default: 2)",
    )
    add("--epochs", type=int, default=10, metavar="N", help="passes over the training images")
    add("--batch-size", type=int, default=32, metavar="N", help="images in the global batch")
    add("--optimizer", default="adam", metavar="NAME", help="a Keras optimizer")
    add(
        "--learning-rate",
        type=float,
        metavar="RATE",
        default=argparse.SUPPRESS,
        help="by default the optimizer's own",
    )
    add("--seed", type=int, default=0, metavar="N", help="of weights and order")
    add("--precision", choices=_PRECISIONS, default="float32", help="Keras dtype policy")
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also train on one device and with the other normalizations, and compare",
    )
    add(
        "--output",
        type=Path,
        default=Path("syncbn-output"),
        metavar="DIR",
        help="folder for the results",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked first, then train and write the results."""
    # Before the imports: an exception within NumPy's would come out as one of its own.
    with stop_flag() as flag:
        return _run(arguments, flag)


def _run(arguments: argparse.Namespace, flag: Flag) -> int:
    from syncbn.training.settings import STRATEGIES, TrainSettings

    arguments.backend = _backend_of(arguments)
    arguments.strategy = getattr(arguments, "strategy", STRATEGIES[arguments.backend][0])
    _check_counts(arguments)
    names = TrainSettings.__dataclass_fields__
    settings = TrainSettings(
        **{name: value for name, value in vars(arguments).items() if name in names}
    )
    settings.check()
    start_framework("train", settings.backend, EXTRAS)
    return _train_and_report(settings, arguments.output, flag)


def _backend_of(arguments: argparse.Namespace) -> str:
    """What the command and the environment say; they must not contradict each other."""
    of_environment = os.environ.get("KERAS_BACKEND") or None
    asked: str = getattr(arguments, "backend", of_environment or "tensorflow")
    if asked not in FRAMEWORKS:
        raise InputError(
            f"syncbn train requires Keras on one of {', '.join(FRAMEWORKS)}. Received: the "
            f"environment variable KERAS_BACKEND={asked}. Unset it."
        )
    if of_environment not in {None, asked}:
        raise InputError(
            "--backend and the environment variable KERAS_BACKEND must agree. Received: --backend "
            f"{asked} with KERAS_BACKEND={of_environment}. Leave one of them out."
        )
    os.environ["KERAS_BACKEND"] = asked
    return asked


def _check_counts(arguments: argparse.Namespace) -> None:
    """What is given must count: not the replicas of workers, nor the workers of one process."""
    own = _COUNTED_BY[arguments.strategy]
    for option in ("--replicas", "--workers"):
        if option != own and hasattr(arguments, option[2:]):
            strategies = [name for name, count in _COUNTED_BY.items() if count == option]
            remedy = f"give {own} instead" if own else "leave it out"
            raise InputError(
                f"{option} is of --strategy {' and '.join(strategies)}. Received: {option} with "
                f"--strategy {arguments.strategy}. Change the strategy, or {remedy}."
            )


def _train_and_report(settings: TrainSettings, folder: Path, flag: Flag) -> int:
    from syncbn.cli import EXIT_INTERRUPTED
    from syncbn.cli.train_view import ProgressView, print_table
    from syncbn.training import comparison, data, job, report

    report.check_drawable()
    # Before anything else: devices are fixed once the framework has started.
    job.prepare_devices(settings)
    job.check_optimizer(settings)
    dataset = data.load(settings.data)
    settings.check_against(dataset)
    report.prepare_folder(folder)
    runs = job.plan(settings)
    code = 0
    if any(run.by_workers for run in runs):
        code = _train_by_workers(runs, settings, flag)
    complete = code == 0
    with ProgressView(lambda: flag.raised) as view:
        for run in runs:
            if complete and not run.by_workers:
                complete = job.train(run, settings, dataset, view, run.epochs.append)
    finished = [run for run in runs if run.epochs]
    if runs[0].epochs:
        model = job.build_model(runs[0], settings, dataset)
        model.set_weights(runs[0].epochs[-1].weights)
        moving = [not variable.trainable for variable in model.weights]
        rows = comparison.rows(finished, moving)
        with without_start_notices():  # Keras loads TensorFlow to save a model, where there is one
            paths = report.write(folder, settings, finished, rows, model, moving)
        print_table(settings, dataset, rows, paths)
    if complete:
        return 0
    kept = f"kept the finished epochs of {len(finished)} run(s)" if finished else "nothing to keep"
    code = code or EXIT_INTERRUPTED
    what = "interrupted" if code == EXIT_INTERRUPTED else "not finished"
    print(f"syncbn: {what}, {kept}", file=sys.stderr)
    return code


def _train_by_workers(runs: list[Run], settings: TrainSettings, flag: Flag) -> int:
    """Have the workers train their runs; the exit code, of which any but 130 has been explained."""
    from syncbn.cli import EXIT_INTERRUPTED
    from syncbn.training import workers

    # -P: a file of the user's folder is not a module of ours.
    command = [sys.executable, "-P", "-m", "syncbn.cli.train_worker"]
    with flag.lowered():
        if flag.raised:
            return EXIT_INTERRUPTED
        code = workers.train_by_workers(runs, settings, command)
    if code not in {0, EXIT_INTERRUPTED}:
        print(
            f"syncbn: error: training on {settings.replicas_in_sync} {settings.kind} requires that "
            f"all of them end well. Received: exit code {code}, for the reason above. Remove "
            "the cause and train again.",
            file=sys.stderr,
        )
    return code
