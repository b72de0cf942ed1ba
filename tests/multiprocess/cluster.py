"""Starts the workers of a cluster on 127.0.0.1, and ends every one of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def run_workers(
    script: str, workers: int, arguments: list[str], timeout: float, killed: int | None = None
) -> list[str]:
    """Run `python -m SCRIPT ARGUMENTS` as each worker of a TF_CONFIG cluster; their outputs.

    A worker that fails or is late ends them all: a peer would wait for it for ever. `killed`: the
    one that ends by SIGKILL, as it must.
    """
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    ends = [-signal.SIGKILL if index == killed else 0 for index in range(workers)]
    processes = []
    for index in range(workers):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config), "PYTHONPATH": path}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", script, *arguments],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        _wait(processes, ends, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        outputs = [process.communicate()[0] for process in processes]
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == ends[index], (
            f"worker {index} ended with {process.returncode}:\n{output}"
        )
    return outputs


def _wait(processes: list[subprocess.Popen[str]], ends: list[int], deadline: float) -> None:
    """Until all have ended as they must, one has ended otherwise, or it is too late."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if codes == ends:
            return
        if any(code not in (end, None) for code, end in zip(codes, ends, strict=True)):
            return
        time.sleep(0.1)
