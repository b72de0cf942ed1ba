"""The results page on peers, memory and ResNet-50: Markdown and plots, from the JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from page_draw import table

__all__ = ["section"]

OURS = "syncbn"
NAMES = {
    "syncbn": "syncbn",
    "syncbn_output": 'syncbn, `save="output"`',
    "keras_sync": "Keras, `synchronized=True`",
    "keras_local": "Keras, local",
    "fused_local": "fused kernel, local",
    "tf_keras_sync": "tf_keras, `synchronized=True`",
    "tf_keras_local": "tf_keras, local",
    "flax_sync": "flax, `axis_name`",
    "flax_local": "flax, local",
    "torch_contiguous": "torch `batch_norm`, NCHW",
    "torch_channels_last": "torch `batch_norm`, NHWC",
    "torch_sync": "torch `SyncBatchNorm`",
    "copy": "a copy (2 of the 8 passes)",
}
STACKS = {
    "relu_stack": "normalization, relu",
    "deep_stack": "1 × 1 convolution, normalization, leaky_relu",
}
MEMORY_LIMIT = 1.05  # times the local fused kernel
OUTPUT_LIMIT = 0.75  # of the same with save="input"
RESNET_GOAL = 1.3  # times Keras's synchronized layer
BLUE, GREY, RED = "#1f5fa8", "#9a9a9a", "#b8432f"


def section(results: Mapping[str, Any], images: Path) -> list[str]:
    """Lines of Markdown on what the documents hold; the plots go to `images`.

    Args:
        results: JSON documents by the stem of their file: `peers`, `memory`, `resnet`. Others are
            not looked at; for a missing one there is a line that says so.
        images: the folder of the plots, which the lines link to as `../images/NAME.png`.
    """
    images.mkdir(parents=True, exist_ok=True)
    parts: dict[str, tuple[str, Callable[[Any, Path], list[str]]]] = {
        "resnet": ("ResNet-50", _resnet),
        "memory": ("Peak memory", _memory),
        "peers": ("Peers in their own frameworks", _peers),
    }
    lines: list[str] = []
    for stem, (title, write) in parts.items():
        lines += [f"## {title}", ""]
        if stem in results:
            lines += write(results[stem], images)
        else:
            lines += [f"Not measured here: `python benchmarks/{stem}.py` does.", ""]
    return lines


def _resnet(document: Mapping[str, Any], images: Path) -> list[str]:
    variants = document["variants"]
    key = "times_as_fast_as_keras_sync"
    replicas, rounds = document["replicas"], document["rounds"]
    rows = [
        [
            NAMES[name],
            f"{found['milliseconds_median']:.0f}",
            _spread(found, key),
            f"{found['first_step_seconds']:.1f}",
            f"{found['peak_megabytes_of_allocator']:.0f}",
        ]
        for name, found in variants.items()
    ]
    own = variants[OURS]
    reached = "reached" if own[key] >= RESNET_GOAL else "not reached"
    _save(_plot_of_resnet(variants, replicas), images / "resnet.png")
    return [
        f"A training step of `keras.applications.ResNet50` ({document['pixels']} px, batch "
        f"{document['batch_per_replica']} a replica, {replicas} replicas, SGD, float32), its "
        f"{document['layers_converted']} normalizations converted; {rounds} rounds in one process.",
        "",
        *table(
            [
                *("layers", "ms a step", "times as fast as Keras's synchronized layer"),
                *("first step, s", "peak MB of the allocator"),
            ],
            rows,
        ),
        f"With ours a step is {own[key]:.2f} times as fast as with Keras's synchronized layer: the "
        f"goal of {RESNET_GOAL} is {reached}. {_rest_of_resnet(variants)}",
        "",
        "![ResNet-50](../images/resnet.png)",
        "",
    ]


def _rest_of_resnet(variants: Mapping[str, Mapping[str, float]]) -> str:
    key = "times_as_fast_as_keras_sync"
    own, bound = variants[OURS], variants["fused_local"]
    faster = [
        NAMES[name]
        for name in ("keras_local", "fused_local")
        if variants[name]["lower_quartile"] > own[key]
    ]
    text = (
        f"With the fused kernel, which does not synchronize, it is {bound[key]:.2f} times as fast: "
        "the rest of the step, convolutions and the optimizer, bounds what any layer can reach."
    )
    if faster:
        text += f" Faster than ours, without synchronizing: {', '.join(faster)}."
    return text


def _memory(document: Mapping[str, Any], images: Path) -> list[str]:
    resident, counted = document["results"]["resident"], document["results"]["allocator"]
    megabytes, layers = document["bytes_a_tensor"] / 1e6, document["layers"]
    lines = [
        f"Peak above the start, forward and backward, one device, {layers} layers of "
        f"{list(document['shape'])} in float32: {megabytes:.1f} MB a tensor; each variant in "
        f"{document['rounds']} fresh processes. *Resident* is what the system had to give, "
        "*allocator* what TensorFlow's own allocator, whose chunks are coarser, had lent. By hand: "
        "the first stack must keep the output of each relu, and needs one tensor to work in; the "
        f"second the outputs of each convolution and each activation: {layers + 1} and "
        f"{2 * layers + 1} tensors.",
        "",
    ]
    for stack, title in STACKS.items():
        rows = [
            [
                NAMES[name],
                f"{found['megabytes_median']:.0f} ({found['lower_quartile']:.0f} to "
                f"{found['upper_quartile']:.0f})",
                f"{found['tensors']:.1f}",
                f"{found['times_fused_local']:.2f}",
                f"{counted[stack][name]['megabytes_median']:.0f}",
            ]
            for name, found in resident[stack].items()
        ]
        heads = ["variant", "resident, MB", "tensors", "times the fused kernel", "allocator, MB"]
        lines += [f"{layers} × ({title}):", "", *table(heads, rows)]
        lines += [_verdict_on_memory(stack, resident[stack]), ""]
    _save(_plot_of_memory(resident), images / "memory.png")
    return [*lines, "![peak memory](../images/memory.png)", ""]


def _verdict_on_memory(stack: str, found: Mapping[str, Mapping[str, float]]) -> str:
    own = found[OURS]["times_fused_local"]
    if stack == "relu_stack":
        within = "within" if own <= MEMORY_LIMIT else "above"
        text = (
            f"Ours needs {own:.2f} times what the local fused kernel needs: {within} the limit of "
            f"{MEMORY_LIMIT}."
        )
    elif "syncbn_output" in found:
        share = found["syncbn_output"]["megabytes_median"] / found[OURS]["megabytes_median"]
        reached = "reached" if share <= OUTPUT_LIMIT else "not reached"
        text = (
            f'`save="output"` needs {1 - share:.0%} less than the same layer with `save="input"`: '
            f"the goal of {1 - OUTPUT_LIMIT:.0%} is {reached}."
        )
    else:
        text = '`save="output"` was not measured: the layer did not have it.'
    less = [
        NAMES[name]
        for name, peer in found.items()
        if not name.startswith(OURS) and peer["upper_quartile"] < found[OURS]["lower_quartile"]
    ]
    return text + (f" Less than ours needs: {', '.join(less)}." if less else "")


def _peers(document: Mapping[str, Any], images: Path) -> list[str]:
    lines = [
        "Forward and backward of one layer in float32, the same values of outputs and gradients; "
        f"each framework in a process of its own, which take turns, {document['rounds']} rounds. A "
        "ratio above 1: ours is faster.",
        "",
    ]
    versions = {
        name: version
        for player in document["players"].values()
        for name, version in player["versions"].items()
    }
    lines += [", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    replica_counts = sorted({row["replicas"] for row in document["results"]}, reverse=True)
    for replicas in replica_counts:
        rows = [row for row in document["results"] if row["replicas"] == replicas]
        lines += [f"### {_title(replicas)}", ""]
        lines += table(
            ["shape", "variant", "ms", "times as fast ours is"],
            [cells for row in rows for cells in _cells_of(row)],
        )
        lines += [*_wins(rows), ""]
    lines += _on_accelerators(document["on_accelerators"])
    _save(_plot_of_peers(document["results"], replica_counts), images / "peers.png")
    return [*lines, "![peers](../images/peers.png)", ""]


def _cells_of(row: Mapping[str, Any]) -> list[list[str]]:
    cells = []
    for name, found in row["variants"].items():
        took = f"{found['milliseconds_median']:.3g}"
        ratio = "" if name == OURS else _spread(found, f"{OURS}_times_as_fast")
        cells.append([str(row["shape_per_replica"]), NAMES[name], took, ratio])
    return cells


def _wins(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who is faster where, by the quartiles; a spread around 1 is neither."""
    faster: dict[str, list[str]] = {}
    even = []
    behind = 0
    for row in rows:
        for name, found in row["variants"].items():
            if name == OURS:
                continue
            shape = str(row["shape_per_replica"])
            if found["upper_quartile"] < 1:
                times = 1 / found[f"{OURS}_times_as_fast"]
                faster.setdefault(name, []).append(f"{shape} ({times:.1f} times as fast)")
            elif found["lower_quartile"] <= 1:
                even.append(f"{NAMES[name]} on {shape}")
            else:
                behind += 1
    lines = [f"- {NAMES[name]} wins on {', '.join(shapes)}." for name, shapes in faster.items()]
    if not lines:
        lines = ["- No peer wins."]
    if even:
        lines.append(f"- Not to be told apart from ours: {', '.join(even)}.")
    lines.append(f"- Ours is faster in {behind} of the comparisons.")
    return lines


def _on_accelerators(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return [
            "`torch.nn.SyncBatchNorm` refuses CPUs. No GPU was at hand: it, and the kernels of the "
            "peers on a GPU, were not measured; the code for that has never run.",
            "",
        ]
    cells = []
    for row in (row for row in rows if "variants" in row):
        copy = row["variants"].get("copy", {}).get("milliseconds_median")
        for name, found in row["variants"].items():
            took = found["milliseconds_median"]
            # The work is 8 passes over memory, a copy is 2.
            share = f"{4 * copy / took:.0%}" if copy and name != "copy" else ""
            shape = str(row["shape_per_replica"])
            cells.append([row["device"], shape, NAMES[name], f"{took:.3g}", share])
    heads = ["device", "shape", "variant", "ms", "of the copy's speed"]
    failed = [
        f"Not measured on {row['device']}: {row['peer']} failed there."
        for row in rows
        if "error" in row
    ]
    return ["### On a GPU", "", *table(heads, cells), *failed, ""]


def _plot_of_peers(results: Sequence[Mapping[str, Any]], replica_counts: Sequence[int]) -> Figure:
    panels = []
    for replicas in replica_counts:
        bars = {
            f"{_plain(name)}  {row['shape_per_replica']}": (found[f"{OURS}_times_as_fast"], found)
            for row in results
            if row["replicas"] == replicas
            for name, found in row["variants"].items()
            if name != OURS
        }
        panels.append((_title(replicas), bars))
    heights = [len(bars) + 2 for _, bars in panels]
    figure = Figure(figsize=(8.5, 0.24 * sum(heights) + 0.8), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)
    for axes, (title, bars) in zip(grid[:, 0], panels, strict=True):
        colours = [RED if value < 1 else BLUE for value, _ in bars.values()]
        _draw_bars(axes, bars, colours, start=1)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color="black", linewidth=0.8)
    label = "times as fast ours is; left of 1 (red) the peer is faster"
    grid[-1, 0].set_xlabel(label, fontsize=9)
    return figure


def _title(replicas: int) -> str:
    return f"{replicas} replicas, synchronized" if replicas > 1 else "One device"


def _plot_of_resnet(variants: Mapping[str, Mapping[str, float]], replicas: int) -> Figure:
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    axes = figure.subplots()
    key = "times_as_fast_as_keras_sync"
    _draw_bars(axes, {_plain(name): (found[key], found) for name, found in variants.items()})
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(f"a step of ResNet-50 on {replicas} replicas", fontsize=10)
    axes.set_xlabel("times as fast as with Keras's synchronized layer", fontsize=9)
    return figure


def _plot_of_memory(stacks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (stack, title) in zip(figure.subplots(1, 2), STACKS.items(), strict=True):
        found = stacks[stack].items()
        _draw_bars(axes, {_plain(name): (one["megabytes_median"], one) for name, one in found})
        axes.set_title(title.replace("1 × 1 convolution, ", "convolution, "), fontsize=10)
        axes.set_xlabel("peak, MB above the start", fontsize=9)
    return figure


def _draw_bars(
    axes: Any,
    bars: Mapping[str, tuple[float, Mapping[str, float]]],
    colours: Sequence[str] | None = None,
    start: float = 0,
) -> None:
    """Lying bars with their quartiles, the first on top; without colours ours stand out."""
    names = list(bars)
    values = [value for value, _ in bars.values()]
    if colours is None:
        colours = [BLUE if name.startswith(OURS) else GREY for name in names]
    # Rounding may put a median a digit outside of its quartiles.
    low = [max(0.0, value - found["lower_quartile"]) for value, found in bars.values()]
    high = [max(0.0, found["upper_quartile"] - value) for value, found in bars.values()]
    axes.barh(names, [value - start for value in values], left=start, color=colours, height=0.7)
    axes.errorbar(
        values, names, xerr=[low, high], fmt="none", ecolor="black", elinewidth=1, capsize=2
    )
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)


def _save(figure: Figure, path: Path) -> None:
    """The same bytes from the same figures: no date, no version."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _plain(name: str) -> str:
    return NAMES[name].replace("`", "")


def _spread(found: Mapping[str, float], key: str) -> str:
    return f"{found[key]:.2f} ({found['lower_quartile']:.2f} to {found['upper_quartile']:.2f})"
