"""Options that the benchmarks share; the machine and the JSON are the package's."""

from __future__ import annotations

import argparse
from pathlib import Path

from syncbn.bench.machine import describe, write

__all__ = ["describe", "options", "write"]


def options(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark takes: how many rounds, and where to write the figures."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    return parser
