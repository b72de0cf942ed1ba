"""What a figure was measured on: kept beside every result."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["describe", "write"]

# Named where they have been imported: versions of what was not measured say nothing.
_PEERS = ("flax", "jax", "tf_keras", "torch")


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
    peers = {name: _version_of_any(name) for name in _PEERS if name in sys.modules}
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
        **peers,
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
