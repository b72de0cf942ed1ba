"""Benchmarks whose figures are measured by several processes of this machine."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["add_options", "free_ports", "measured_by", "tf_config"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `measured_by` hands to each process, and how long they may take."""
    parser.add_argument("--timeout", type=float, default=600, help="seconds")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def tf_config(workers: int) -> Callable[[int], Mapping[str, str]]:
    """What tells each worker the TensorFlow cluster, on free ports."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(workers)]}

    def of_worker(index: int) -> dict[str, str]:
        task = {"type": "worker", "index": index}
        return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}

    return of_worker


def measured_by(
    script: str,
    processes: int,
    arguments: Sequence[str],
    timeout: float,
    environment: Callable[[int], Mapping[str, str]] = lambda _: {},
) -> Any:
    """Run a script as each process until the first has ended, end the others, read its figures.

    The others may still be needed while the first receives its last numbers.

    Args:
        script: its path; `--worker FILE --index NUMBER` is added, and process 0 writes the file.
        processes: how many.
        arguments: further ones.
        timeout: seconds that each may take.
        environment: what is added to that of each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, script, *arguments, "--worker", str(output), "--index"]
        running = [
            subprocess.Popen([*command, str(index)], env={**os.environ, **environment(index)})
            for index in range(processes)
        ]
        deadline = time.monotonic() + timeout
        try:
            while running[0].poll() != 0:
                failed = [code for code in (one.poll() for one in running) if code]
                if failed or time.monotonic() > deadline:
                    reason = f"ended with {failed[0]}" if failed else f"took over {timeout:g} s"
                    raise RuntimeError(f"{Path(script).name}: a process {reason}")
                time.sleep(0.05)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return json.loads(output.read_text(encoding="utf-8"))
