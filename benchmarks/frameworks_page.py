"""The section of the results page on JAX and torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from page_draw import NAMES, table
from page_targets import against

__all__ = ["section"]

BASELINE = "keras"


def section(results: Mapping[str, Any], images: Path) -> list[str]:  # noqa: ARG001
    """Markdown lines.

    Args:
        results: JSON documents by their file's stem; `on_jax` and `on_torch` are used.
        images: folder of the plots; there are none here.
    """
    return [*_on_jax(results.get("on_jax")), *_on_torch(results.get("on_torch"))]


def _on_jax(document: Any) -> list[str]:
    if document is None:
        return ["## JAX", "", "*There are no figures of `benchmarks/on_jax.py`: run it.*", ""]
    places = {
        "processes": f"{document['processes']} processes, DataParallel",
        "one_device": "one device",
    }
    rows = []
    for place, name in places.items():
        for chain in document["results"][place]:
            what = f"{chain['layers']} × {list(chain['shape_per_process'])}"
            rows += [[f"{name}: {what}", *cells] for cells in _rows(chain["variants"])]
    return [
        "## JAX",
        "",
        "A training step of a chain of layers, relu between them, float32, under "
        "`keras.distribution.DataParallel` by processes over gloo on 127.0.0.1, a device each, and "
        f"on one device; shapes are those on a process; {document['rounds']} rounds. Keras's layer "
        "is global there too, by four collectives a layer, ours by two.",
        "",
        *table(["chain", "variant", "ms", "times as fast as Keras"], rows),
    ]


def _on_torch(document: Any) -> list[str]:
    if document is None:
        return ["## torch", "", "*There are no figures of `benchmarks/on_torch.py`: run it.*", ""]
    rows = []
    for one in document["results"]["one_process"]:
        what = f"one process: {list(one['shape'])}, axis {one['axis']}"
        rows += [[what, *cells] for cells in _rows(one["variants"])]
    for chain in document["results"]["processes"]:
        what = f"{document['processes']} processes: {chain['layers']} × "
        what += str(list(chain["shape_per_process"]))
        rows += [[what, *cells] for cells in _rows(chain["variants"])]
    return [
        "## torch",
        "",
        "Forward and backward in float32, eager, on a CPU: one layer in one process, and chains by "
        "processes over gloo on 127.0.0.1, relu between the layers, where ours synchronizes and "
        f"the others do not; {document['rounds']} rounds. *Torch's own kernel* is "
        "`torch.nn.functional.batch_norm`.",
        "",
        *table(["inputs", "variant", "ms", "times as fast as Keras"], rows),
    ]


def _rows(variants: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Cells of each variant: its name, milliseconds, its speed."""
    rows = []
    for name, figure in variants.items():
        bar = against(figure, BASELINE)
        speed = "1" if name == BASELINE or bar is None else f"{bar.value:.2f} "
        if bar is not None and name != BASELINE:
            speed += f"({bar.low:.2f} to {bar.high:.2f})"
        rows.append([NAMES[name], f"{figure['milliseconds_median']:.2f}", speed])
    return rows
