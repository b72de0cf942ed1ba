"""What a figure was measured on: kept beside every result."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["describe", "options", "write"]


def options(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark takes: how many rounds, and where to write the figures."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    return parser


def write(path: Path | None, **document: Any) -> None:
    """Write figures as JSON, with the machine and the versions that they were measured on.

    Nothing where there is no path.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**document, "machine": describe()}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def describe() -> dict[str, str | int]:
    """Processor, cores and versions."""
    return {
        "architecture": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else (os.cpu_count() or 0),
        "python": platform.python_version(),
        "syncbn": metadata.version("syncbn"),
        "keras": metadata.version("keras"),
        "tensorflow": _version_of_any("tensorflow", "tensorflow-cpu"),
        "numpy": metadata.version("numpy"),
    }


def _version_of_any(*distributions: str) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        return platform.processor()
    return names[0] if names else platform.processor()
