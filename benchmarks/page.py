"""Makes docs/reference/speed.md and its plots from benchmarks/results, and from nothing else.

python benchmarks/page.py
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import page_sections as sections
from page_targets import targets_section

HERE = Path(__file__).parent
OWN: dict[str, Callable[[Any, Path], list[str]]] = {
    "layer": sections.layer,
    "one_device": sections.one_device,
    "workers": sections.workers,
    "features": sections.features,
    "training": sections.training,
    "monitor": sections.monitor,
    "accuracy": sections.accuracy,
}
# Modules with a section of their own: section(results, images) gives its lines.
OTHERS = ("kernels_page", "frameworks_page", "peers_page", "scaling_page")

WIDTH = 120

HEAD = """\
What synchronizing costs, and what this layer makes of it. `make bench` measures everything here \
again and writes this page from its figures; `syncbn bench` runs the short one on your own devices \
and says in a sentence whether synchronizing is worth it there."""

METHOD = """\
The variants take turns in one process, or in one pair of processes, on the same inputs, and who \
is first changes from round to round. A machine's speed drifts by more than the differences that \
matter; those that take turns meet the same drift. So a ratio is taken within each round, and what \
is shown is the **median** of the rounds' ratios and, in brackets, their **quartiles**: half of \
the rounds lie between them. Trust ratios; milliseconds are the medians of that machine on that \
day. *Times as fast* is above 1 where the variant is faster than what it is compared with."""


def load(folder: Path) -> dict[str, Any]:
    """All results, by the stem of their file."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def page(results: Mapping[str, Any], images: Path) -> str:
    """The page; the plots go to `images`."""
    images.mkdir(parents=True, exist_ok=True)
    lines = ["# Speed", "", HEAD, "", *targets_section(results)]
    lines += ["## How it is measured", "", METHOD, "", *_machines(results)]
    for stem, write in OWN.items():
        if stem in results:
            lines += write(results[stem], images)
        else:
            lines += [f"*There are no figures of `benchmarks/{stem}.py`: run it.*", ""]
    for name in OTHERS:
        # Each is delivered with the benchmark that it is about.
        if (HERE / f"{name}.py").exists():
            lines += importlib.import_module(name).section(results, images)
    return "\n".join(_wrapped([*lines, *_how_to_reproduce(results)])) + "\n"


def _wrapped(lines: Sequence[str]) -> Iterator[str]:
    """Prose in lines of the documents' width; rows of tables, headings and code as they are."""
    in_code = False
    for line in lines:
        in_code ^= line.startswith("```")
        if in_code or not line or line.startswith(("|", "#", "![", "```")):
            yield line
            continue
        yield textwrap.fill(
            line,
            WIDTH,
            subsequent_indent="  " if line.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _machines(results: Mapping[str, Any]) -> list[str]:
    """What the figures were measured on, once for all files that agree."""
    where: dict[str, list[str]] = {}
    for stem, document in results.items():
        machine = dict(document.get("machine", {}))
        cpu = machine.pop("cpu", None) or machine.get("architecture", "an unknown processor")
        text = (
            f"{machine.pop('cores', '?')} cores of {cpu} ({machine.pop('architecture', '?')}), "
            f"{machine.pop('system', '?')}; "
            + ", ".join(f"{name} {version}" for name, version in machine.items())
        )
        where.setdefault(text, []).append(f"`{stem}`")
    lines = [f"- {', '.join(stems)}: {text}" for text, stems in where.items()]
    return ["Measured on:", "", *lines, ""]


def _how_to_reproduce(results: Mapping[str, Any]) -> list[str]:
    commands = [
        f"$ .venv/bin/python benchmarks/{stem}.py --output benchmarks/results/{stem}.json"
        for stem in results
    ]
    return [
        "## Reproduce",
        "",
        "<!-- block: not run: it takes a quarter of an hour -->",
        "```console",
        "$ make bench        # all of it, and this page",
        "$ syncbn bench      # the short one, on your devices",
        *commands,
        "$ .venv/bin/python benchmarks/page.py",
        "```",
    ]


def main() -> int:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of JSON")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="where to write")
    arguments = parser.parse_args()
    results = load(arguments.results)
    if not results:
        parser.error(f"{arguments.results} has no results: run `make bench`")
    text = page(results, arguments.docs / "images")
    made = arguments.docs / "reference" / "speed.md"
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(text, encoding="utf-8")
    print(f"{made} from {len(results)} files of results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
