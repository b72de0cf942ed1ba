"""The first table of the results page: what was to be reached, and what the figures say."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from page_draw import Bar, table

__all__ = ["TARGETS", "Reached", "Target", "against", "targets_section"]

OURS = "syncbn"
KERAS_SYNC = "keras_sync"
FUSED_LOCAL = "fused_local"


class Reached(NamedTuple):
    """What the figures come to: by the median, whether the target is reached."""

    text: str
    holds: bool
    within_spread: bool  # the target lies between the quartiles


class Target(NamedTuple):
    """One row: which results it is read from, and how."""

    measurement: str
    target: str
    stem: str  # of the file of results
    read: Callable[[Any], Reached | None]  # None where these results do not say


def against(figure: Mapping[str, float], baseline: str) -> Bar | None:
    """How many times as fast as a baseline, of the figures of one variant."""
    key = f"times_as_fast_as_{baseline}"
    if key not in figure:
        return None
    own = f"_against_{baseline}" if f"lower_quartile_against_{baseline}" in figure else ""
    return Bar(figure[key], figure[f"lower_quartile{own}"], figure[f"upper_quartile{own}"])


def _reached(bar: Bar | None, limit: float, *, at_least: bool = True, unit: str) -> Reached | None:
    if bar is None:
        return None
    holds = (operator.ge if at_least else operator.le)(bar.value, limit)
    text = f"{bar.value:.2f} {unit} ({bar.low:.2f} to {bar.high:.2f})"
    return Reached(text, holds, bar.low < limit < bar.high)


def _of_shape(document: Any, shape: tuple[int, ...]) -> Mapping[str, Any] | None:
    for result in document["results"]:
        if tuple(result.get("shape_per_replica", result.get("shape", ()))) == shape:
            return dict(result["variants"])
    return None


def _times_as_fast(shape: tuple[int, ...], baseline: str, limit: float) -> Any:
    """A reader of a layer of that shape."""

    def read(document: Any) -> Reached | None:
        variants = _of_shape(document, shape)
        own = against(variants[OURS], baseline) if variants else None
        return _reached(own, limit, unit="times")

    return read


def _times_the_fused_kernel(shape: tuple[int, ...], limit: float) -> Any:
    """A reader of how many times as long a layer of that shape takes."""

    def read(document: Any) -> Reached | None:
        variants = _of_shape(document, shape)
        fast = against(variants[OURS], FUSED_LOCAL) if variants else None
        if fast is None:
            return None
        slow = Bar(1 / fast.value, 1 / fast.high, 1 / fast.low)
        return _reached(slow, limit, at_least=False, unit="times its time")

    return read


def _of_a_step(limit: float) -> Any:
    """A reader of a whole step, against Keras's synchronized layer."""

    def read(document: Any) -> Reached | None:
        return _reached(against(document["variants"][OURS], KERAS_SYNC), limit, unit="times")

    return read


def _of_place(place: str, shape: tuple[int, ...], limit: float) -> Any:
    """A reader of inputs of that shape on JAX or torch, against Keras's layer."""

    def read(document: Any) -> Reached | None:
        for one in document["results"][place]:
            if tuple(one.get("shape", one.get("shape_per_process"))) == shape:
                return _reached(against(one["variants"][OURS], "keras"), limit, unit="times")
        return None

    return read


def _memory(stack: str, own: str, other: str, limit: float) -> Callable[[Any], Reached | None]:
    """A reader of the ratio of two peaks."""

    def read(document: Any) -> Reached | None:
        peaks = document["results"]["resident"][stack]
        if own not in peaks or other not in peaks:
            return None
        mine, base = peaks[own], peaks[other]["megabytes_median"]
        bar = Bar(
            *(mine[key] / base for key in ("megabytes_median", "lower_quartile", "upper_quartile"))
        )
        return _reached(bar, limit, at_least=False, unit="times")

    return read


def _accuracy(document: Any) -> Reached | None:
    worst = max(
        ours / theirs
        for row in document["results"]
        for ours, theirs in zip(row[OURS], row[KERAS_SYNC], strict=True)
    )
    return Reached(f"at most {worst:.2f} times its error", worst <= 1, within_spread=False)


_LARGE = (16, 56, 56, 64)
_SHAPES = (_LARGE, (16, 14, 14, 256), (64, 128), (1024, 512))
_AT_LEAST = dict(zip(_SHAPES, (3.0, 1.8, 1.5, 1.5), strict=True))

TARGETS = [
    *(
        Target(
            f"{list(shape)} × 2 replicas, against Keras `synchronized=True`",
            f"≥ {limit} times as fast",
            "layer",
            _times_as_fast(shape, KERAS_SYNC, limit),
        )
        for shape, limit in _AT_LEAST.items()
    ),
    Target(
        f"{list(_LARGE)} × 2 replicas, against the local fused kernel",
        "≤ 1.25 times its time",
        "layer",
        _times_the_fused_kernel(_LARGE, 1.25),
    ),
    *(
        Target(
            f"{list(shape)} on one device, against Keras's plain layer",
            "≥ 2.0 times as fast",
            "one_device",
            _times_as_fast(shape, "keras_local", 2.0),
        )
        for shape in _SHAPES
    ),
    Target(
        "2 workers over loopback, 20 layers of [8, 7, 7, 256], against Keras `synchronized=True`",
        "≥ 2.3 times as fast",
        "workers",
        _of_a_step(2.3),
    ),
    Target(
        "a step of ResNet-50 × 2 replicas, against Keras `synchronized=True`",
        "≥ 1.3 times as fast",
        "resnet",
        _of_a_step(1.3),
    ),
    Target(
        "peak memory of 12 layers of [16, 56, 56, 64], relu between, against the fused kernel",
        "≤ 1.05 times",
        "memory",
        _memory("relu_stack", OURS, FUSED_LOCAL, 1.05),
    ),
    Target(
        'peak memory of a deep stack with `save="output"`, against `save="input"`',
        "≤ 0.75 times",
        "memory",
        _memory("deep_stack", "syncbn_output", OURS, 0.75),
    ),
    *(
        Target(
            f"JAX, 2 processes over loopback, {layers} layers of {list(shape)}, against Keras",
            f"≥ {limit} times as fast",
            "on_jax",
            _of_place("processes", shape, limit),
        )
        for layers, shape, limit in (
            (20, (16, 8, 8, 32), 2.0),
            (20, (16, 4, 4, 256), 2.0),
            (3, (16, 56, 56, 64), 1.2),
        )
    ),
    *(
        Target(
            f"torch, one process, {list(shape)}, against Keras",
            "≥ 2.5 times as fast",
            "on_torch",
            _of_place("one_process", shape, 2.5),
        )
        for shape in ((32, 64, 56, 56), (32, 56, 56, 64))
    ),
    Target(
        "error against float64, at any mean, against Keras `synchronized=True`",
        "no larger",
        "accuracy",
        _accuracy,
    ),
]


def targets_section(results: Mapping[str, Any]) -> list[str]:
    """A row for each target: what it was, what was reached, and whether that is enough."""
    rows = []
    for measurement, target, stem, read in TARGETS:
        reached = read(results[stem]) if stem in results else None
        if reached is None:
            rows.append([measurement, target, "not measured", "–"])
            continue
        verdict = "yes" if reached.holds else "**no**"
        # The median decides; rounds fell on either side of the target.
        verdict += ", within the spread" if reached.within_spread else ""
        rows.append([measurement, target, reached.text, verdict])
    outcomes = [row[-1] for row in rows]
    counts = {
        "reached": sum(outcome.startswith("yes") for outcome in outcomes),
        "not reached": sum(outcome.startswith("**no") for outcome in outcomes),
        "not measured": outcomes.count("–"),
    }
    summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return [
        "## Targets",
        "",
        f"Of {len(rows)}: {summary}. Medians decide; in brackets are the quartiles.",
        "",
        *table(["measurement", "target", "reached", "enough?"], rows),
    ]
