"""What `syncbn train` shows: a progress bar, then one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console  # noqa: TID253 - this module is loaded when a job starts
from rich.progress import (  # noqa: TID253
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table  # noqa: TID253

from syncbn.cli.start import FRAMEWORKS

if TYPE_CHECKING:
    from syncbn.training.comparison import Row
    from syncbn.training.data import Dataset
    from syncbn.training.settings import TrainSettings

__all__ = ["ProgressView", "print_table"]

_SHORT = 10
_IN_FLOAT32 = {
    "jax": "BatchNormalization",
    "torch": "BatchNormalization and the products of Dense",
}


class ProgressView:
    """A bar for each run, on stderr; an observer of the job.

    Each has a display of its own: the launcher, which passes on a worker's, follows one line.
    """

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        self.stop_requested = stop_requested
        self._console = Console(file=sys.stderr)
        self._progress: Progress | None = None

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()

    def start(self, run: str, steps: int) -> None:
        """A new bar; the one before stays as it is."""
        self._leave()
        self._progress = Progress(
            TextColumn("{task.description:17}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._progress.start()
        self._task = self._progress.add_task(run, total=steps, loss=float("nan"))

    def advance(self, loss: float) -> None:
        """One step further, with the loss of that step's batch."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1, loss=loss)

    def _leave(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def print_table(
    settings: TrainSettings, dataset: Dataset, rows: list[Row], paths: list[Path]
) -> None:
    """The table on stdout, what it says in a sentence, and where the files are."""
    console = Console()
    compared = any(row.difference for row in rows)
    # Eighty columns hold the headings in one line where the names of the runs are short.
    gap = "\n" if max(len(row.run) for row in rows) > _SHORT else " "
    table = Table(
        title=f"{settings.model} on {dataset.name}, {len(dataset.x_train)} training images,{gap}"
        f"{FRAMEWORKS[settings.backend]}, {settings.precision}, "
        f"global batch {settings.batch_size}, {rows[0].epochs} epochs"
    )
    # The others are in the files.
    table.add_column("run", no_wrap=True)
    for heading in ("loss", f"test{gap}loss", f"test{gap}accuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    if compared:
        table.add_column("Δ weights", justify="right", no_wrap=True)
        table.add_column(f"Δ moving{gap}stats", justify="right", no_wrap=True)
    for row in rows:
        cells = [
            row.run,
            f"{row.train_loss:.4f}",
            f"{row.test_loss:.4f}",
            f"{row.test_accuracy:.2%}",
        ]
        if compared:
            cells += [f"{gap:.1e}" for gap in row.difference] if row.difference else ["–", "–"]
        table.add_row(*cells)
    console.print(table)
    if compared:
        console.print(
            "Δ: the largest difference of any weight, and of any moving mean or variance, from "
            "what one device trained from the same start on the same global batches. reordered: "
            "one device again, each batch back to front; its Δ is rounding alone, amplified by "
            "training."
        )
        for remark in _remarks(settings):
            console.print(remark)
    elif not settings.compare:
        console.print("Add --compare to see how far this is from one device.")
    console.print("Written: " + ", ".join(str(path) for path in paths), soft_wrap=True)


def _remarks(settings: TrainSettings) -> Iterator[str]:
    """What is of Keras's backend in the figures of a comparison."""
    if settings.backend == "jax" and settings.replicas_in_sync > 1:
        yield (
            "On JAX keras is keras.layers.BatchNormalization, which keras.distribution makes "
            "global; local is syncbn.SyncBatchNormalization(group_size=1), each device by its own "
            "part of the batch."
        )
    in_float32 = _IN_FLOAT32.get(settings.backend)
    if settings.precision == "float64" and in_float32:
        yield (
            f"On {FRAMEWORKS[settings.backend]} Keras computes {in_float32} in float32 whatever "
            "the precision. So one device normalizes by the formula itself, in float64."
        )
