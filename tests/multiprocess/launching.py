"""Runs `syncbn launch` with small programs, and finds whatever is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.multiprocess.cluster import ROOT

MARK = "SYNCBN_TEST_MARK"
# What every program may use.
START = """
import json, os, pathlib, signal, socket, subprocess, sys, time
RANK = int(os.environ["RANK"])
TRY = int(os.environ["SYNCBN_RESTARTS"])
def ready():
    pathlib.Path(f"ready{RANK}-{TRY}").touch()
"""
LISTENS = (
    START
    + """
host, _, port = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"][RANK].rpartition(":")
server = socket.create_server(("", int(port)))  # as TensorFlow's: on all interfaces
"""
)


class Launch:
    """A launcher with a program, and the mark by which all its processes are found."""

    def __init__(self, folder: Path, program: str, *options: str, arguments: tuple[str, ...] = ()):
        self.folder = folder
        self.program = folder / "program.py"
        self.program.write_text(textwrap.dedent(program))
        self.mark = uuid.uuid4().hex
        self.command = [
            # As the script `syncbn`, which does not look for modules in the current folder.
            *(sys.executable, "-P", "-m", "syncbn", "launch"),
            *options,
            str(self.program),
            *arguments,
        ]
        paths = filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")])
        self.environment = {**os.environ, MARK: self.mark, "PYTHONPATH": os.pathsep.join(paths)}

    def run(self, seconds: float = 60, **options) -> subprocess.CompletedProcess[str]:
        """To its end."""
        return subprocess.run(
            self.command,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            **options,
        )

    def start(self, **options) -> subprocess.Popen[str]:
        """In the background."""
        return subprocess.Popen(
            self.command,
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def processes(self) -> list[int]:
        """All that run, of the launcher, the workers and whatever these have started."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def kill_all(self) -> None:
        for process in self.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def wait_until(condition: Callable[[], object], seconds: float = 20) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def all_ready(launch: Launch) -> Callable[[], bool]:
    """Whether both workers have come so far."""
    return lambda: all((launch.folder / f"ready{w}-0").exists() for w in range(2))
