"""`syncbn train`: train a classifier on replicas and show that it equals one device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncbn.cli.interrupt import Flag, stop_flag
from syncbn.cli.start import start_tensorflow
from syncbn.errors import InputError

if TYPE_CHECKING:
    from syncbn.training.job import Run
    from syncbn.training.settings import TrainSettings

__all__ = ["EXTRAS", "add_parser"]

EXTRAS = "tensorflow,train"

_PRECISIONS = ("float32", "float64", "mixed_bfloat16", "mixed_float16")
# The option that says how many, of each strategy.
_COUNTED_BY = {"mirrored": "--replicas", "multiworker": "--workers", "none": None}


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a classifier on replicas and compare it with one device",
        description="Train a classifier of real images on several replicas, of one process or of "
        "several. With --compare the "
        "same model, from the same weights on the same batches, is also trained on one device, "
        "with local statistics and with Keras's own synchronization, and a table says how far "
        "each is from one device. Writes model.keras, history.csv, table.json and curves.png.",
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
        help="sync: syncbn.SyncBatchNormalization; local: keras.layers.BatchNormalization; "
        "keras: the same with synchronized=True",
    )
    _add_training_options(add)
    parser.set_defaults(run=run)


def _add_training_options(add: Callable[..., Any]) -> None:
    add(
        "--strategy",
        choices=tuple(_COUNTED_BY),
        default="mirrored",
        help="mirrored: replicas in step, in one process; multiworker: worker processes in step, "
        "on this machine; none: one device",
    )
    # Without a default, to see whether they were given.
    add(
        "--replicas",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="of --strategy mirrored: devices; virtual CPU devices where there are fewer "
        "accelerators (default: 2)",
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
    from syncbn.training.settings import TrainSettings

    _check_counts(arguments)
    names = TrainSettings.__dataclass_fields__
    settings = TrainSettings(
        **{name: value for name, value in vars(arguments).items() if name in names}
    )
    settings.check()
    start_tensorflow("train", EXTRAS)
    return _train_and_report(settings, arguments.output, flag)


def _check_counts(arguments: argparse.Namespace) -> None:
    """What is given must count: not the replicas of workers, nor the workers of one process."""
    for strategy, option in _COUNTED_BY.items():
        if option and strategy != arguments.strategy and hasattr(arguments, option[2:]):
            own = _COUNTED_BY[arguments.strategy]
            remedy = f"give {own} instead" if own else "leave it out"
            raise InputError(
                f"{option} is of --strategy {strategy}. Received: {option} with --strategy "
                f"{arguments.strategy}. Change the strategy, or {remedy}."
            )


def _train_and_report(settings: TrainSettings, folder: Path, flag: Flag) -> int:
    from syncbn.cli import EXIT_INTERRUPTED
    from syncbn.cli.train_view import ProgressView, print_table
    from syncbn.training import comparison, data, job, report

    report.check_drawable()
    # Before anything else: devices are fixed once TensorFlow has started.
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
        model = job.build_model(settings.norm, settings, dataset)
        model.set_weights(runs[0].epochs[-1].weights)
        moving = [not variable.trainable for variable in model.weights]
        rows = comparison.rows(finished, moving)
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
            f"syncbn: error: training on {settings.workers} workers requires that all of them end "
            f"well. Received: exit code {code}, for the reason above. Remove the cause and train "
            "again.",
            file=sys.stderr,
        )
    return code
