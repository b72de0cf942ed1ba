"""Sections of the results page on what this folder measures in one process, and on workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from page_draw import NAMES, Bar, bars, errors, table
from page_targets import against

__all__ = [
    "accuracy",
    "features",
    "layer",
    "monitor",
    "one_device",
    "training",
    "winners",
    "workers",
]

OURS = "syncbn"
KERAS_SYNC = "keras_sync"
KERAS_LOCAL = "keras_local"
FUSED_LOCAL = "fused_local"
COPIED = (
    "*Bandwidth*: the work reads and writes the tensor 8 times at least, forward twice and once, "
    "backward two tensors twice and once; the column is the share of the bandwidth of a copy, "
    "`x + dy` in the same rounds, at which that would take as long. Small tensors are far below "
    "it, as the number of operations decides there; above 100 % the caches help."
)


def layer(document: Any, images: Path) -> list[str]:
    """On one layer on replicas."""
    return [
        "## One layer on replicas",
        "",
        f"Forward and backward of one layer in float32 on {document['replicas']} replicas, which "
        f"share the machine; {document['rounds']} rounds. {COPIED}",
        "",
        *_shapes(document, KERAS_SYNC, images / "speed-layer.png"),
    ]


def one_device(document: Any, images: Path) -> list[str]:
    """On one layer without a strategy."""
    return [
        "## One device",
        "",
        "The same on one device without a strategy, where nothing is synchronized and Keras's "
        f"plain layer is the one to compare with; {document['rounds']} rounds.",
        "",
        *_shapes(document, KERAS_LOCAL, images / "speed-one-device.png"),
    ]


def _shapes(document: Any, baseline: str, image: Path) -> list[str]:
    """The table, the plots and the winners of a document with a result for each shape."""
    rows, wins = [], []
    speeds: dict[str, dict[str, Bar]] = {}
    shares: dict[str, dict[str, Bar]] = {}
    for result in document["results"]:
        shape = str(list(result.get("shape_per_replica", result.get("shape"))))
        variants = result["variants"]
        speeds[shape] = _bars_of(variants, baseline)
        wins += [f"- {shape}: {line}" for line in winners(variants, baseline)]
        for name, figure in variants.items():
            share = figure.get("bandwidth_fraction")
            if share is not None:
                shares.setdefault(shape, {})[name] = Bar(*(3 * [100 * share]))
            rows.append(
                [
                    shape,
                    NAMES[name],
                    f"{figure['milliseconds_median']:.2f}",
                    _ratio_of(name, figure, baseline),
                    _ratio_of(name, figure, FUSED_LOCAL),
                    "–" if share is None else f"{100 * share:.1f} %",
                ]
            )
    heads = [
        *("inputs", "variant", "ms", f"times as fast as {NAMES[baseline]}"),
        *(f"times as fast as {NAMES[FUSED_LOCAL]}", "bandwidth"),
    ]
    lines = [*table(heads, rows), *_won(wins), *_plot(image, speeds, baseline)]
    if shares:
        path = image.with_stem(f"{image.stem}-bandwidth")
        bars(path, shares, "share of the copy bandwidth, %", (100, "as fast as copying"), ".1")
        lines += [f"![share of the copy bandwidth](../images/{path.name})", ""]
    return lines


def _plot(image: Path, groups: Mapping[str, Mapping[str, Bar]], baseline: str) -> list[str]:
    """Speeds as bars, and the line that shows them."""
    text = f"times as fast as {NAMES[baseline]}"
    bars(image, groups, f"{text}; whiskers: quartiles", (1.0, f"as fast as {NAMES[baseline]}"))
    return [f"![{text}](../images/{image.name})", ""]


def features(document: Any, _images: Path) -> list[str]:
    """On masks, the activation inside, groups."""
    lines = [
        "## Masks, activation, groups",
        "",
        f"One layer on {document['replicas']} replicas, {document['rounds']} rounds. Keras's "
        "masked layer does not synchronize.",
        "",
    ]
    rows = []
    for result in document["results"]:
        for figures in result["comparisons"].values():
            first = next(iter(figures))
            for name, figure in figures.items():
                rows.append(
                    [
                        str(result["shape_per_replica"]),
                        f"`{name}`",
                        f"{figure['milliseconds_median']:.2f}",
                        "1" if name == first else f"{_ratio(against(figure, first))} of `{first}`",
                    ]
                )
    return [*lines, *table(["inputs", "variant", "ms", "times as fast"], rows)]


def training(document: Any, _images: Path) -> list[str]:
    """On a step of fit."""
    rows = []
    for result in document["results"]:
        for name, figure in result["variants"].items():
            rows.append(
                [
                    result["model"],
                    "Keras's trainer" if name == "keras" else name,
                    f"{figure['milliseconds_median']:.2f}",
                    _ratio_of(name, figure, "keras"),
                ]
            )
    return [
        "## A step of fit, repaired",
        "",
        f"`enable_multi_worker` against Keras's own trainer on {document['replicas']} replicas, "
        f"full batches, where both are right; {document['rounds']} rounds.",
        "",
        *table(["model", "trainer", "ms", "times as fast as Keras's"], rows),
    ]


def workers(document: Any, images: Path) -> list[str]:
    """On worker processes."""
    variants = document["variants"]
    rows = [
        [
            NAMES.get(name, name),
            f"{figure['milliseconds_median']:.1f}",
            _ratio_of(name, figure, KERAS_SYNC),
        ]
        for name, figure in variants.items()
    ]
    shape, count = document["shape_per_replica"], document["workers"]
    work = f"{document['layers']} layers of {list(shape)} on {count} workers"
    groups = {f"{count} workers": _bars_of(variants, KERAS_SYNC)}
    return [
        "## Workers",
        "",
        f"A step of fit of {work}, processes on 127.0.0.1, relu between the layers, in Keras's "
        f"repaired trainer; {document['rounds']} rounds.",
        "",
        *table(["variant", "ms", f"times as fast as {NAMES[KERAS_SYNC]}"], rows),
        *_won([f"- {line}" for line in winners(variants, KERAS_SYNC)]),
        *_plot(images / "speed-workers.png", groups, KERAS_SYNC),
    ]


def accuracy(document: Any, images: Path) -> list[str]:
    """On errors at large means."""
    results = document["results"]
    both = (KERAS_SYNC, OURS)
    rows = [
        [f"{row['mean']:g}", *(f"{row[name][which]:.1e}" for which in (0, 1) for name in both)]
        for row in results
    ]
    means = [row["mean"] for row in results]
    lines = {name: [row[name][0] for row in results] for name in both}
    errors(images / "speed-accuracy.png", means, lines, "relative error of the variance")
    heads = ["mean", "variance, relative: Keras", "syncbn"]
    return [
        "## Error",
        "",
        "What the speed does not cost: largest errors against float64 NumPy over the whole batch, "
        "for inputs of standard deviation 1. [accuracy.md](../explanation/accuracy.md) has more.",
        "",
        *table([*heads, "outputs, in standard deviations: Keras", "syncbn"], rows),
        "![error](../images/speed-accuracy.png)",
        "",
    ]


def winners(variants: Mapping[str, Mapping[str, float]], baseline: str) -> list[str]:
    """Who is faster than ours, by the quartiles; where the spreads meet, nobody is.

    From the rounds' ratios of the two where they were kept, else from those to the baseline.
    """
    own = variants[OURS]
    lines = []
    for name in variants:
        direct = against(own, name)
        if name == OURS:
            continue
        if direct is not None:
            if direct.high < 1:
                lines.append(f"{NAMES[name]} wins: ours is {_ratio(direct)} times as fast.")
            continue
        ours, theirs = against(own, baseline), against(variants[name], baseline)
        if ours and theirs and ours.high < theirs.low:
            lines.append(
                f"{NAMES[name]} wins: {_ratio(theirs)} times as fast as {NAMES[baseline]}, ours "
                f"{_ratio(ours)}."
            )
    return lines


def _won(lines: Sequence[str]) -> list[str]:
    if not lines:
        return ["No variant is faster than ours.", ""]
    return ["Where another is faster than ours:", "", *lines, ""]


def _bars_of(variants: Mapping[str, Mapping[str, float]], baseline: str) -> dict[str, Bar]:
    found = {name: against(figure, baseline) for name, figure in variants.items()}
    return {name: bar for name, bar in found.items() if bar is not None and name != baseline}


def _ratio_of(name: str, figure: Mapping[str, float], baseline: str) -> str:
    return "1" if name == baseline else _ratio(against(figure, baseline))


def _ratio(bar: Bar | None) -> str:
    return "–" if bar is None else f"{bar.value:.2f} ({bar.low:.2f} to {bar.high:.2f})"


def monitor(document: Any, _images: Path) -> list[str]:
    """On what watching costs."""
    rows = []
    for result in document["results"]:
        figure, plain = result["figures"]["monitored"], result["figures"]["without"]
        low, median, high = (
            100 * (1 / figure[name] - 1)
            for name in ("upper_quartile", "times_as_fast_as_without", "lower_quartile")
        )
        reading, step = result["milliseconds_of_a_reading"], plain["milliseconds_median"]
        share = 100 * reading / document["interval"] / step
        rows.append(
            [
                result["model"],
                str(result["replicas"]),
                f"{step:.2f}",
                f"{median:+.1f} % ({low:+.1f} to {high:+.1f})",
                f"{reading:.1f}",
                f"{share:.1f} %",
                f"{median + share:+.1f} %",
            ]
        )
    return [
        "## Watching with SyncMonitor",
        "",
        f"Steps of fit with it and without in turn, {document['rounds']} of each, on TensorFlow; "
        f"and a reading, written for TensorBoard, which is one of {document['interval']} steps. "
        "What each step has to tell is below what steps differ by where the quartiles have 0 "
        "between them.",
        "",
        *table(
            [
                "model",
                "replicas",
                "ms a step",
                "more, watched",
                "ms a reading",
                f"of {document['interval']} steps",
                "together",
            ],
            rows,
        ),
    ]
