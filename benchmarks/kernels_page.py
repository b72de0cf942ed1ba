"""The section of the results page on the kernels: what the layer's choice rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from page_draw import table

__all__ = ["section"]


def section(results: Mapping[str, Any], images: Path) -> list[str]:  # noqa: ARG001
    """Markdown lines.

    Args:
        results: JSON documents by their file's stem; `kernels` is the one that is used.
        images: folder of the plots; there are none here.
    """
    lines = ["## Kernels", ""]
    if "kernels" not in results:
        return [*lines, "Not measured: `results/kernels.json` is missing.", ""]
    document = results["kernels"]
    rows = []
    for result in document["results"]:
        variants = result["variants"]
        best = min(variants, key=lambda name: variants[name]["milliseconds_median"])
        cells = [f"{one['milliseconds_median']:.2f}" for one in variants.values()]
        rows.append([f"`{result['shape']}`", *cells, best, result["chosen"]])
    names = list(document["results"][0]["variants"])
    strips = document["strips"]
    usual = strips["usual"]
    return [
        *lines,
        "The passes over one replica's part between the collectives, in milliseconds: *composed* "
        "of elementary operations, *compiled* by XLA so that each pass reads its tensors once, and "
        "TensorFlow's *fused* batch normalization in inference mode. In graphs on CPUs the layer "
        "chooses by the size, where it is known or where the examples are images, of 65,536 "
        "elements or more; on GPUs, in eager execution and for shapes that vary it takes the fused "
        "one. Compiling takes a fifth of a second for each shape and device.",
        "",
        *table(["inputs", *names, "fastest", "taken"], rows),
        f"The compiled passes sum {usual} strips of rows side by side. By their number, on "
        f"`{strips['shape']}`, times as fast as {usual}:",
        "",
        *table(
            ["strips", "speed"],
            [
                [name, f"{figure[f'times_as_fast_as_{usual}']:.2f}"]
                for name, figure in strips["variants"].items()
            ],
        ),
    ]
