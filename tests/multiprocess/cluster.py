"""Starts the workers of a cluster on 127.0.0.1, and ends every one of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


class Ended(NamedTuple):
    """A process that is no more."""

    status: int
    output: str


def run_workers(
    script: str, workers: int, arguments: list[str], timeout: float, killed: int | None = None
) -> list[str]:
    """Run `python -m SCRIPT ARGUMENTS` as each worker of a TF_CONFIG cluster; their outputs.

    A worker that fails or is late ends them all: a peer would wait for it for ever. `killed`: the
    one that ends by SIGKILL, as it must.
    """
    ends = [-signal.SIGKILL if index == killed else 0 for index in range(workers)]
    command = [sys.executable, "-m", script, *arguments]
    ended = run_processes(command, workers, timeout, ends=ends)
    for index, (status, output) in enumerate(ended):
        assert status == ends[index], f"worker {index} ended with {status}:\n{output}"
    return [output for _, output in ended]


def run_processes(
    command: list[str],
    workers: int,
    timeout: float,
    *,
    grace: float = 0.0,
    ends: list[int] | None = None,
) -> list[Ended]:
    """Run the command as each worker of a TF_CONFIG cluster, or by itself if there is one.

    Args:
        command: and its arguments.
        workers: how many.
        timeout: seconds until all that still run are ended.
        grace: seconds that the others have once one has failed.
        ends: the exit code that each must have, by default 0.
    """
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    with contextlib.ExitStack() as files:
        outputs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(workers)]
        processes = []
        for index, output in enumerate(outputs):
            paths = filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")])
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            if workers > 1:
                task = {"type": "worker", "index": index}
                config = {"cluster": {"worker": addresses}, "task": task}
                environment["TF_CONFIG"] = json.dumps(config)
            processes.append(
                subprocess.Popen(
                    command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
                )
            )
        try:
            _wait(processes, time.monotonic() + timeout, _as_they_must(ends or [0] * workers))
            _wait(processes, time.monotonic() + grace, lambda codes: None not in codes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                process.wait()
        ended = []
        for process, output in zip(processes, outputs, strict=True):
            output.seek(0)
            ended.append(Ended(process.returncode, output.read()))
    return ended


def _as_they_must(ends: list[int]) -> Callable[[list[int | None]], bool]:
    """Whether all have ended as they must, or one otherwise."""

    def decided(codes: list[int | None]) -> bool:
        others = (code not in (end, None) for code, end in zip(codes, ends, strict=True))
        return codes == ends or any(others)

    return decided


def _wait(
    processes: list[subprocess.Popen[bytes]],
    deadline: float,
    wanted: Callable[[list[int | None]], bool],
) -> None:
    """Until the exit codes are as wanted, or it is too late."""
    while time.monotonic() < deadline:
        if wanted([process.poll() for process in processes]):
            return
        time.sleep(0.1)
