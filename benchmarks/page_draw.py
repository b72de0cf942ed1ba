"""Plots of the results page: the same bytes from the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["NAMES", "Bar", "bars", "errors", "save", "table"]

NAMES = {
    "syncbn": "syncbn",
    "keras_sync": "Keras, synchronized",
    "keras_local": "Keras, local",
    "fused_local": "fused kernel, local",
    "tf_keras_sync": "tf_keras, synchronized",
    "keras": "Keras",
    "native": "torch's own kernel",
}
# Told apart by eyes that see no difference of red and green (Okabe and Ito).
_COLOURS = {
    "syncbn": "#0072b2",
    "keras_sync": "#d55e00",
    "keras_local": "#e69f00",
    "fused_local": "#999999",
    "tf_keras_sync": "#cc79a7",
}


class Bar(NamedTuple):
    """A median, and the quartiles around it."""

    value: float
    low: float
    high: float


def bars(
    path: Path,
    groups: Mapping[str, Mapping[str, Bar]],
    label: str,
    mark: tuple[float, str],
    digits: str = ".2",
) -> None:
    """Lying bars in groups, the first on top, quartiles as whiskers, medians in figures.

    Args:
        path: of the PNG.
        groups: by their names, bars by the name of the variant.
        label: of the axis, with its unit.
        mark: a value to compare with, and what it is.
        digits: of the medians, as in a format.
    """
    rows = sum(len(group) for group in groups.values()) + len(groups)
    figure = Figure(figsize=(8, 1.1 + 0.24 * rows), layout="constrained")
    axes = figure.subplots()
    position, ticks = 0.0, []
    most = max(bar.high for group in groups.values() for bar in group.values())
    seen = set()
    for group in groups.values():
        ticks.append(position + (len(group) - 1) / 2)
        for name, bar in group.items():
            whiskers = [[max(0.0, bar.value - bar.low)], [max(0.0, bar.high - bar.value)]]
            colour = _COLOURS.get(name, "#56b4e9")
            legend = NAMES.get(name, name) if name not in seen else None
            seen.add(name)
            axes.barh(position, bar.value, height=0.8, color=colour, label=legend)
            if bar.low < bar.high:
                axes.errorbar(
                    bar.value, position, xerr=whiskers, fmt="none", ecolor="black", capsize=2
                )
            # On white, above the line of the mark.
            axes.text(
                *(bar.high + 0.012 * most, position, f"{bar.value:{digits}f}"),
                va="center",
                fontsize=8,
                zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )
            position += 1
        position += 1
    axes.axvline(mark[0], color="black", linewidth=0.9, linestyle="--", label=mark[1])
    axes.set_yticks(ticks, list(groups))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * most)
    axes.set_xlabel(label)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    _tidy(axes)
    save(figure, path)


def errors(
    path: Path, x: Sequence[float], lines: Mapping[str, Sequence[float]], label: str
) -> None:
    """Errors over the mean of the values, both logarithmic but for a mean of 0."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(x))
    for name, values in lines.items():
        axes.plot(places, values, marker="o", color=_COLOURS[name], label=NAMES[name])
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{value:g}" for value in x])
    axes.set_xlabel("mean of the inputs, in standard deviations")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Without date or version, which would change the bytes."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """In Markdown, with an empty line behind it."""
    line = "| {} |".format
    return [
        line(" | ".join(heads)),
        line(" | ".join("---" for _ in heads)),
        *(line(" | ".join(row)) for row in rows),
        "",
    ]


def _tidy(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
