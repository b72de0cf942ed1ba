"""Programs of a page, run one after the other in a process that lives as long as the page."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

# No block of a page may take longer; seconds.
LIMIT = 150
MARK = "-- the end of a block --"

# What runs in the process: each block in one namespace, its source known to tracebacks and to
# TensorFlow, which reads the source of functions that it compiles.
_DRIVER = f"""
import json, linecache, os, sys, traceback
space = {{"__name__": "__main__"}}
for line in sys.stdin:
    code, name = json.loads(line)
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    failed = ""
    try:
        exec(compile(code, name, "exec"), space)
    except SystemExit as end:
        failed = f"SystemExit: {{end.code}}" if end.code else ""
    except BaseException:
        failed = traceback.format_exc()
    sys.stderr.flush()
    print({MARK!r} + json.dumps(failed), flush=True)
"""

ENVIRONMENTS = {
    "tensorflow": {},  # Keras's own choice, as of a reader who has chosen nothing
    "jax": {
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    },
    "torch": {"KERAS_BACKEND": "torch"},
    "tf_keras": {"KERAS_BACKEND": "tensorflow", "TF_USE_LEGACY_KERAS": "1"},
}


class BlockError(AssertionError):
    """A block does not do what its page says; shows the difference."""


def environment(backend: str) -> dict[str, str]:
    """What a program of a page finds: the project's commands, the CPU, no colours."""
    unset = {"SYNCBN_KERAS", "SYNCBN_MUTANT", "TF_CONFIG", "XLA_FLAGS", "TF_USE_LEGACY_KERAS"}
    unset |= {"KERAS_BACKEND"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        **ENVIRONMENTS[backend],
    }


def end(process: subprocess.Popen[str]) -> None:
    """Kills a process and all that it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Session:
    """Runs Python blocks; a context manager whose exit ends the process."""

    def __init__(self, folder: Path, backend: str):
        self._errors = (folder / f".{backend}.stderr").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DRIVER],
            cwd=folder,
            env={**environment(backend), "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def run(self, code: str, name: str) -> tuple[str, str]:
        """What the block printed to stdout and to stderr.

        Raises:
            BlockError: It raised, ended its process, or took longer than `LIMIT` seconds.
        """
        start = os.fstat(self._errors.fileno()).st_size
        stopped = threading.Timer(LIMIT, end, [self._process])
        stopped.start()
        printed, failed = [], f"ended its process, or ran past {LIMIT} s"
        try:
            self._process.stdin.write(json.dumps([code, name]) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                text, mark, outcome = line.partition(MARK)
                printed.append(text)
                if mark:
                    failed = json.loads(outcome)
                    break
        except BrokenPipeError:
            failed = "its process had ended already"
        finally:
            stopped.cancel()
        with Path(self._errors.name).open(encoding="utf-8", errors="replace") as errors:
            errors.seek(start)
            said = errors.read()
        if failed:
            raise BlockError(f"{name}: {failed}\n{said[-4000:]}")
        return "".join(printed), said

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process)
        self._errors.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
