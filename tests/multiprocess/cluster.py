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


def run_workers(script: str, workers: int, arguments: list[str], timeout: float) -> list[str]:
    """Run `python -m SCRIPT ARGUMENTS` as each worker of a TF_CONFIG cluster; their outputs.

    A worker that fails or is late ends them all: a peer would wait for it for ever.
    """
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    processes = []
    for index in range(workers):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config), "PYTHONPATH": str(ROOT)}
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
        _wait(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        outputs = [process.communicate()[0] for process in processes]
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"worker {index} ended with {process.returncode}:\n{output}"
    return outputs


def _wait(processes: list[subprocess.Popen[str]], deadline: float) -> None:
    """Until all have ended well, one has failed, or it is too late."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(code not in (0, None) for code in codes):
            return
        time.sleep(0.1)
