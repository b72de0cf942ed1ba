"""The section of the results page on scaling: tables and plots of `results/scaling.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["section"]

NAMES = {
    "syncbn": "syncbn",
    "keras_sync": "Keras, synchronized",
    "keras_local": "Keras, local",
    "fused_local": "fused kernel, local",
}
COLOURS = {
    "syncbn": "#0b6e4f",
    "keras_sync": "#c1440e",
    "keras_local": "#6b7280",
    "fused_local": "#1f2937",
}
IGNORED = (
    "What the model leaves out: stragglers (every collective is a barrier and begins when the last "
    "replica is there), other traffic on the network, what launching an operation costs (each "
    "microsecond more a collective is {ours:.3f} ms a step for syncbn and {keras:.3f} ms for "
    "Keras), memory traffic, in-network reduction (NVLink SHARP, InfiniBand SHARP), and overlap "
    "with computing: collectives of the forward cannot overlap, as the next layer needs them."
)


def section(results: Mapping[str, Any], images: Path) -> list[str]:
    """Markdown lines; the plots are written into `images` and linked as `../images/NAME.png`.

    Args:
        results: JSON documents by their file's stem; `scaling` is the one that is used.
        images: Folder of the plots, made where it is not there.
    """
    lines = ["## Scaling", ""]
    if "scaling" not in results:
        return [*lines, "Not measured: `results/scaling.json` is missing.", ""]
    document = results["scaling"]
    images.mkdir(parents=True, exist_ok=True)
    for part in (_replicas, _payload, _workers, _paper):
        lines += part(document, images)
    return lines


def _table(
    head: Sequence[str], rows: Iterable[Sequence[object]], text: Sequence[str] = ("layer", "source")
) -> list[str]:
    """Columns are numbers, to the right, but for the first one and those named as text."""
    rule = ["---" if name == head[0] or name in text else "---:" for name in head]
    cells = [head, rule, *rows]
    return [*(f"| {' | '.join(map(str, row))} |" for row in cells), ""]


def _replicas(document: Mapping[str, Any], images: Path) -> list[str]:
    """1 to 8 virtual replicas, each with the same work."""
    machine = document["machine"]
    lines = [
        "### Virtual replicas at fixed work each",
        "",
        f"Forward and backward of one layer on R virtual devices of one processor with "
        f"{machine['cores']} cores. The work grows with R and the cores do not, so that the time "
        "of a step has to grow too: what can be read is the time over that of local normalization "
        "on as many replicas, in the same rounds (median, quartiles in brackets), and the examples "
        "a second.",
        "",
        _faster_than_ours(document),
        "",
    ]
    shapes = [entry["shape_per_replica"] for entry in document["replicas"][0]["shapes"]]
    for index, shape in enumerate(shapes):
        rows = []
        for part in document["replicas"]:
            for name, figure in part["shapes"][index]["variants"].items():
                cells = [_times(figure[f"times_the_time_of_{n}"]) for n in _LOCAL]
                ms, rate = figure["milliseconds_median"], figure["examples_per_second"]
                rows.append((part["replicas"], NAMES[name], f"{ms:.2f}", f"{rate:,}", *cells))
        head = ("R", "layer", "ms a step", "examples/s", "time / fused local", "time / Keras local")
        lines += [f"{_shape(shape)} a replica:", "", *_table(head, rows)]
    _plot_replicas(document, shapes, images / "scaling_replicas.png")
    alt = "Time of a step over the fused local kernel's, for 1 to 8 replicas"
    return [*lines, f"![{alt}](../images/scaling_replicas.png)", ""]


_LOCAL = ("fused_local", "keras_local")


def _faster_than_ours(document: Mapping[str, Any]) -> str:
    """Where Keras's synchronized layer wins, by the medians of ratios of the same rounds."""
    found = [
        f"{_shape(entry['shape_per_replica'])} × {part['replicas']}"
        for part in document["replicas"]
        for entry in part["shapes"]
        if _over_fused(entry, "keras_sync") < _over_fused(entry, "syncbn")
    ]
    if not found:
        return "Keras's synchronized layer is faster than syncbn in none of these."
    return f"Keras's synchronized layer is faster than syncbn at {', '.join(found)}."


def _over_fused(entry: Mapping[str, Any], name: str) -> float:
    return float(entry["variants"][name]["times_the_time_of_fused_local"]["median"])


def _times(figure: Mapping[str, float]) -> str:
    return f"{figure['median']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _payload(document: Mapping[str, Any], images: Path) -> list[str]:
    """What a replica hands to collectives, from the graph."""
    parts = [part for part in document["replicas"] if part["replicas"] > 1]
    same = all(part["payload"] == parts[0]["payload"] for part in parts)
    counts = ", ".join(str(part["replicas"]) for part in parts)
    rows = []
    for row in parts[0]["payload"]:
        ways = [
            f"{row[f'{way}_collectives']}: {row[f'{way}_bytes']:,} B "
            f"({', '.join(row[f'{way}_types'])})"
            for way in ("forward", "backward")
        ]
        total = row["forward_bytes"] + row["backward_bytes"]
        rows.append((row["channels"], NAMES[row["variant"]], *ways, f"{total:,} B"))
    _plot_payload(parts[0]["payload"], images / "scaling_payload.png")
    said = "the same for" if same else "not the same for all; shown is the first of"
    return [
        "### Payload",
        "",
        "Collectives of one layer and step, and the bytes that one replica hands to them, read "
        f"from the graph ({said} R = {counts}; none for R = 1). syncbn: (2C+1)·8 forward and 2C·4 "
        "backward; the script fails where the graph has anything else. Its float64 makes it "
        f"{_more_bytes(parts[0]['payload']):.0%} more bytes than Keras's float32 for the largest "
        "C, in two collectives and not five.",
        "",
        *_table(("C", "layer", "forward", "backward", "together"), rows),
        "![Bytes a replica hands to collectives, by channels](../images/scaling_payload.png)",
        "",
    ]


def _more_bytes(rows: Sequence[Mapping[str, Any]]) -> float:
    largest = max(row["channels"] for row in rows)
    of = {
        row["variant"]: row["forward_bytes"] + row["backward_bytes"]
        for row in rows
        if row["channels"] == largest
    }
    return float(of["syncbn"] / of["keras_sync"] - 1)


def _workers(document: Mapping[str, Any], images: Path) -> list[str]:
    """The line through bare collectives of workers, and what it predicts."""
    two, more = document["workers"]["two"], document["workers"]["more"]
    rows = [
        (
            f"{row['bytes']:,}" + ("" if row["fitted"] else " (not fitted)"),
            f"{row['milliseconds']['median']:.2f} "
            f"({row['milliseconds']['low']:.2f} to {row['milliseconds']['high']:.2f})",
            f"{row['predicted_milliseconds']:.2f}",
            f"{row['predicted_over_measured']:.2f}",
        )
        for row in two["collectives"]
    ]
    chains = [
        (
            workers,
            NAMES[chain["variant"]],
            chain["collectives"],
            f"{chain['milliseconds']['median']:.0f}",
            f"{chain['predicted_milliseconds']:.0f}",
            f"{chain['relative_error']:+.0%}",
        )
        for workers, found in ((2, two), (more["workers"], more))
        for chain in found["chains"]
    ]
    first = two["chains"][0]
    _plot_workers(two, images / "scaling_workers.png")
    return [
        "### Workers over loopback, and a line through them",
        "",
        "Bare collectives of 2 worker processes on one machine, by size. Least relative squares "
        f"give {two['latency_milliseconds']:.2f} ms + bytes / "
        f"{two['gigabytes_per_second']:.2f} GB/s.",
        "",
        *_table(("bytes", "ms measured", "ms by the line", "line / measured"), rows),
        "![Time of a collective between 2 workers by its size](../images/scaling_workers.png)",
        "",
        f"What it says of {first['layers']} layers of {first['channels']} channels measured in the "
        f"same run, and, as a ring of {more['workers']} (2(R−1) steps in place of 2), of "
        f"{more['workers']} workers, which share {document['machine']['cores']} cores:",
        "",
        *_table(
            ("workers", "layer", "collectives", "ms measured", "ms predicted", "error"), chains
        ),
    ]


def _paper(document: Mapping[str, Any], images: Path) -> list[str]:
    """ResNet-50 on 8 to 4096 GPUs."""
    paper = document["paper"]
    batches = paper["images_a_replica"]
    rows = [
        (
            row["ranks"],
            NAMES[row["variant"]],
            row["collectives"],
            "{:.1f} to {:.1f}".format(*row["milliseconds"]),
            *(_shares(row["share_by_images_a_replica"][str(batch)]) for batch in batches),
        )
        for row in paper["rows"]
    ]
    head = ("GPUs", "layer", "collectives", "ms a step")
    shares = tuple(f"share of a step of {batch} images" for batch in batches)
    costs = {row["variant"]: row["milliseconds"][0] for row in paper["rows"]}
    per_step = {row["variant"]: row["collectives"] for row in paper["rows"]}
    constants = [
        (
            f"`{c['name']}`",
            f"{c['low']:g}" + ("" if c["low"] == c["high"] else f" to {c['high']:g}"),
            c["unit"],
            ("**assumed**: " if c["assumed"] else "") + c["source"],
        )
        for c in paper["constants"]
    ]
    _plot_paper(paper, images / "scaling_paper.png")
    return [
        "### On paper: ResNet-50 on 8 to 4096 GPUs",
        "",
        f"Not measured, computed. The {len(paper['layers'])} batch "
        "normalizations of `keras.applications.ResNet50`, nodes of 8 GPUs, NCCL's own model of "
        "its protocol LL by the faster of ring and tree, one collective after the other. The low "
        "end is what NCCL itself would expect; the high end multiplies it by the worst published "
        "measurement found, for both layers alike: at any point between, Keras's collectives cost "
        f"{costs['keras_sync'] / costs['syncbn']:.1f} times what syncbn's cost. "
        "The share is of a step of synchronizing and computing together.",
        "",
        *_table((*head, *shares), rows),
        "![Share of a ResNet-50 step that synchronizing takes](../images/scaling_paper.png)",
        "",
        IGNORED.format(ours=1e-3 * per_step["syncbn"], keras=1e-3 * per_step["keras_sync"]),
        "",
        *_table(("constant", "value", "unit", "source"), constants),
    ]


def _shares(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}"


def _axes(count: int, width: float = 4.6) -> tuple[Any, Any]:
    """Without pyplot: no window, no state that outlives the plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.tick_params(labelsize=9)
        axis.grid(visible=True, color="#e5e7eb", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    """The same bytes for the same figures: matplotlib's version is no part of them."""
    figure.savefig(path, metadata={"Software": None})


def _plot_replicas(
    document: Mapping[str, Any], shapes: Sequence[Sequence[int]], path: Path
) -> None:
    figure, axes = _axes(len(shapes))
    counts = [part["replicas"] for part in document["replicas"]]
    for index, (axis, shape) in enumerate(zip(axes, shapes, strict=True)):
        for name in ("syncbn", "keras_sync", "keras_local", "fused_local"):
            found = [
                part["shapes"][index]["variants"][name]["times_the_time_of_fused_local"]
                for part in document["replicas"]
            ]
            low, high = ([f[which] for f in found] for which in ("low", "high"))
            axis.fill_between(counts, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
            medians = [f["median"] for f in found]
            axis.plot(counts, medians, "o-", color=COLOURS[name], label=NAMES[name], markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("virtual replicas R")
        axis.set_title(f"{_shape(shape)} a replica", fontsize=10)
    axes[0].set_ylabel("time of a step / fused local, same R")
    axes[0].legend(fontsize=8, frameon=False)
    _save(figure, path)


def _plot_payload(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, (axis,) = _axes(1, 5.6)
    for variant in ("syncbn", "keras_sync"):
        own = [row for row in rows if row["variant"] == variant]
        collectives = own[0]["forward_collectives"] + own[0]["backward_collectives"]
        total = [row["forward_bytes"] + row["backward_bytes"] for row in own]
        label = f"{NAMES[variant]}: {collectives} collectives"
        channels = [row["channels"] for row in own]
        axis.plot(channels, total, "o-", color=COLOURS[variant], label=label, markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(channels, [str(count) for count in channels])
    ticks = [1 << shift for shift in range(8, 17, 2)]
    axis.set_yticks(ticks, [f"{t} B" if t < 1024 else f"{t >> 10} KiB" for t in ticks])
    axis.set_xlabel("channels C")
    axis.set_ylabel("bytes a replica, layer and step")
    axis.legend(fontsize=8, frameon=False)
    _save(figure, path)


def _plot_workers(two: Mapping[str, Any], path: Path) -> None:
    figure, (axis,) = _axes(1, 5.6)
    for fitted, style in ((True, "o"), (False, "x")):
        own = [row for row in two["collectives"] if row["fitted"] is fitted]
        times = [row["milliseconds"] for row in own]
        spread = [[abs(t["median"] - t[which]) for t in times] for which in ("low", "high")]
        label = "measured, quartiles" + ("" if fitted else "; not fitted")
        axis.errorbar(
            [row["bytes"] for row in own],
            [t["median"] for t in times],
            yerr=spread,
            fmt=style,
            color=COLOURS["syncbn"] if fitted else COLOURS["keras_local"],
            label=label,
            capsize=2,
        )
    sizes = [row["bytes"] for row in two["collectives"]]
    fine = [sizes[0] * (sizes[-1] / sizes[0]) ** (step / 100) for step in range(101)]
    slope = 1e-6 / two["gigabytes_per_second"]  # milliseconds a byte
    line = [two["latency_milliseconds"] + slope * size for size in fine]
    axis.plot(fine, line, "-", color=COLOURS["keras_sync"], label="latency + bytes / bandwidth")
    axis.axvspan(264, 32776, color="#0b6e4f", alpha=0.07, label="what a layer hands over")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = [1 << shift for shift in (3, 10, 15, 20, 24)]
    axis.set_xticks(ticks, ["8 B", "1 KiB", "32 KiB", "1 MiB", "16 MiB"])
    axis.set_xlabel("size of the collective")
    axis.set_ylabel("ms")
    axis.legend(fontsize=8, frameon=False)
    _save(figure, path)


def _plot_paper(paper: Mapping[str, Any], path: Path) -> None:
    batches = paper["images_a_replica"]
    figure, axes = _axes(len(batches))
    for axis, batch in zip(axes, batches, strict=True):
        for variant in ("keras_sync", "syncbn"):
            own = [row for row in paper["rows"] if row["variant"] == variant]
            ranks = [row["ranks"] for row in own]
            bounds = [row["share_by_images_a_replica"][str(batch)] for row in own]
            low, high = ([100 * b[end] for b in bounds] for end in (0, 1))
            label = f"{NAMES[variant]}, {own[0]['collectives']} collectives"
            colour = COLOURS[variant]
            axis.fill_between(ranks, low, high, color=colour, alpha=0.25, linewidth=0, label=label)
            axis.plot(ranks, low, "-", color=colour)
            axis.plot(ranks, high, "--", color=colour, linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks[::3], [str(count) for count in ranks[::3]])
        axis.set_ylim(0, 100)
        axis.set_xlabel("GPUs, 8 a node")
        axis.set_title(f"{batch} images a GPU", fontsize=10)
    axes[0].set_ylabel("share of a ResNet-50 step, %")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    _save(figure, path)
