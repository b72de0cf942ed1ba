"""What a job leaves in its output folder: model, history, table and picture, each written whole."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from syncbn.errors import InputError
from syncbn.files import written_whole
from syncbn.training.comparison import REFERENCE, Row, differences
from syncbn.training.job import Run
from syncbn.training.settings import TrainSettings

__all__ = ["FILES", "check_drawable", "prepare_folder", "write"]

FILES = ("model.keras", "history.csv", "table.json", "curves.png")


def prepare_folder(folder: Path) -> None:
    """Make sure that results can be written there, before hours are spent on them.

    Raises:
        InputError: it is a file, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in FILES:
            if (folder / name).is_dir():
                raise IsADirectoryError(None, f"{name} in it is a folder")
    except OSError as error:
        raise InputError(
            f"--output must be a folder that can be written to. Received: {str(folder)!r} "
            f"({error.strerror or error}). Give another folder."
        ) from error


def write(
    folder: Path,
    settings: TrainSettings,
    runs: list[Run],
    rows: list[Row],
    model: Any,
    moving: list[bool],
) -> list[Path]:
    """Write all files of the job and return their paths.

    Args:
        folder: exists.
        settings: of the job.
        runs: those that finished an epoch; the wanted one first.
        rows: of the table.
        model: the wanted run's, with its last weights.
        moving: for each weight, whether it is a moving statistic.
    """
    writers: tuple[Callable[[Path], None], ...] = (
        model.save,
        lambda path: _write_history(path, runs),
        lambda path: _write_table(path, settings, rows),
        lambda path: _draw_curves(path, runs, moving),
    )
    paths = []
    for name, write_file in zip(FILES, writers, strict=True):
        path = folder / name
        with written_whole(path) as temporary:
            write_file(temporary)
        paths.append(path)
    return paths


def _write_history(path: Path, runs: list[Run]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ("run", "epoch", "loss", "accuracy", "test_loss", "test_accuracy", "seconds")
        )
        for run in runs:
            for epoch in run.epochs:
                table.writerow(
                    (run.name, epoch.number, *epoch.train, *epoch.test, round(epoch.seconds, 4))
                )


def _write_table(path: Path, settings: TrainSettings, rows: list[Row]) -> None:
    document = {
        "settings": dataclasses.asdict(settings),
        "reference": REFERENCE if any(row.difference for row in rows) else None,
        "rows": [
            {**row._asdict(), "difference": row.difference and row.difference._asdict()}
            for row in rows
        ],
    }
    text = json.dumps(_without_nan(document), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """The same with null for what diverged: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw_curves(path: Path, runs: list[Run], moving: list[bool]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    reference = next((run for run in runs if run.name == REFERENCE), None)
    compared = [run for run in runs if reference is not None and run is not reference]
    figure = Figure(figsize=(15 if compared else 9, 4.2), layout="constrained")
    axes = figure.subplots(1, 3 if compared else 2)
    for index, run in enumerate(runs):
        # Runs that agree lie on each other: each is thinner than the one below it.
        style: dict[str, Any] = {
            "color": f"C{index}",
            "label": run.name,
            "linestyle": "-" if index == 0 else (0, (4, 1 + index)),
            "linewidth": 6.0 / (1 + index),
        }
        # A line of one point is not seen.
        style["marker"] = "o" if len(run.epochs) == 1 else ""
        epochs = [epoch.number for epoch in run.epochs]
        axes[0].plot(epochs, [epoch.test.loss for epoch in run.epochs], **style)
        axes[1].plot(epochs, [epoch.test.accuracy for epoch in run.epochs], **style)
        if run in compared and reference is not None:
            gaps = [gap.weights for gap in differences(run, reference, moving)]
            # A logarithmic axis cannot show an exact 0.
            axes[2].plot(
                epochs[: len(gaps)], [gap or 1e-17 for gap in gaps], **{**style, "marker": "o"}
            )
    axes[0].set(title="Test loss", ylabel="cross-entropy (nats)")
    axes[1].set(title="Test accuracy", ylabel="share of right answers")
    if compared:
        axes[2].set(title="Largest difference from one device", ylabel="any weight", yscale="log")
    for panel in axes:
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.legend()
    figure.savefig(path, dpi=120)


def check_drawable() -> None:
    """Raise an InputError where the packages for the picture or the bar are missing."""
    try:
        import matplotlib
        import rich
    except ImportError as error:
        raise InputError(
            f"syncbn train requires matplotlib and rich. Received: no package {error.name!r}. "
            "Install them: pip install 'syncbn[train]'."
        ) from error
    del matplotlib, rich
