"""Runs Python code in a process of its own: imports there are those of the code alone."""

from __future__ import annotations

import os
import subprocess
import sys


def python(code: str, *, seconds: float = 120, **environment: str) -> str:
    """What the code prints; it must end well."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
