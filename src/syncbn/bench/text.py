"""The figures of the short benchmark as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from syncbn.bench.layer import FLOOR_PASSES
from syncbn.bench.variants import FUSED_LOCAL, KERAS_SYNC

__all__ = ["LEGEND", "layer_lines", "training_lines", "wrapped"]

_WIDTH = 100

LEGEND = (
    "Medians over rounds in which all take turns; in brackets the quartiles of the rounds' ratios. "
    f"bandwidth: the share of the copy bandwidth (x + dy) at which the {FLOOR_PASSES} passes over "
    "the tensor that the work needs at least would take as long; above 100 % it is in the cache."
)


def layer_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The table of one shape."""
    shape = list(result["shape_per_replica"])
    yield (
        f"one layer, {shape} on each replica, forward and backward, float32; copied at "
        f"{result['copy_gigabytes_per_second']:.1f} GB/s"
    )
    yield from _table(result["variants"])


def training_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The table of the training step."""
    image = result["image"]
    yield (
        "a step of training a small convolutional network, "
        f"{result['batch_per_replica']} images of {image} × {image} on each replica"
    )
    yield from _table(result["variants"])


def _table(figures: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    shows_bandwidth = all("bandwidth_fraction" in figure for figure in figures.values())
    yield (
        f"  {'':18}{'ms':>9}   {f'times as fast as {KERAS_SYNC}':>27}   "
        f"{f'as {FUSED_LOCAL}':>20}" + "   bandwidth" * shows_bandwidth
    )
    for name, figure in figures.items():
        against_local = _ratio(figure, FUSED_LOCAL, f"_against_{FUSED_LOCAL}")
        line = (
            f"  {name:18}{figure['milliseconds_median']:9.2f}   "
            f"{_ratio(figure, KERAS_SYNC, ''):>27}   {against_local:>20}"
        )
        yield line + (f"   {100 * figure['bandwidth_fraction']:7.1f} %" if shows_bandwidth else "")


def _ratio(figure: Mapping[str, float], baseline: str, of_baseline: str) -> str:
    low, high = (figure[f"{end}_quartile{of_baseline}"] for end in ("lower", "upper"))
    return f"{figure[f'times_as_fast_as_{baseline}']:.2f} ({low:.2f} to {high:.2f})"


def wrapped(text: str) -> str:
    """The text in lines that fit a terminal."""
    return textwrap.fill(text, _WIDTH)
