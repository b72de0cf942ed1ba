"""Runs the rows of the doctor's table of versions, each in an environment of its own.

    python tests/doctor_versions.py                      # all rows, about half an hour
    python tests/doctor_versions.py 2.15.1 jax           # some
    python tests/doctor_versions.py --environments DIR   # keep them there, for the next time

TensorFlow up to 2.11 needs Python 3.10 or older, up to 2.1 Python 3.7: a row whose interpreter is
not found (as python3.8 on the path, or under ~/.pyenv) is reported as not run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from syncbn.doctor import table  # noqa: E402
from syncbn.doctor.children import run_probe  # noqa: E402
from syncbn.doctor.verdict import tried_layers  # noqa: E402
from tests.doctor_rows import Facts, departures  # noqa: E402 - after the path
from tests.multiprocess.cluster import free_ports  # noqa: E402


class Row(NamedTuple):
    python: str
    pins: tuple[str, ...]
    subject: table.Subject
    environment: Mapping[str, str] = MappingProxyType({})


OLD = ("protobuf<3.21",)
OLDEST = (*OLD, "numpy<1.19", "h5py<3")


def bundled(python: str, version: str, *pins: str) -> Row:
    number = table.version_of(version, "TensorFlow")
    subject = table.Subject("tf.keras", "tensorflow", number)
    return Row(python, (f"tensorflow-cpu=={version}", *pins), subject)


def keras_3(version: str, keras: str) -> Row:
    numbers = (table.version_of(version, ""), table.version_of(keras, ""))
    subject = table.Subject("keras", "tensorflow", *numbers)
    return Row("3.11", (f"tensorflow-cpu=={version}", f"keras=={keras}"), subject)


def legacy(version: str, tf_keras: str) -> Row:
    subject = table.Subject("tf_keras", "tensorflow", table.version_of(version, ""))
    pins = (f"tensorflow-cpu=={version}", f"tf_keras=={tf_keras}")
    return Row("3.11", pins, subject, {"TF_USE_LEGACY_KERAS": "1"})


ROWS = {
    "2.1.4": bundled("3.7", "2.1.4", *OLDEST),
    "2.2.3": bundled("3.8", "2.2.3", *OLDEST),
    "2.5.3": bundled("3.8", "2.5.3", *OLD),
    "2.8.4": bundled("3.8", "2.8.4", *OLD),
    "2.9.3": bundled("3.8", "2.9.3"),
    "2.11.1": bundled("3.8", "2.11.1"),
    "2.12.1": bundled("3.8", "2.12.1"),
    "2.13.1": bundled("3.8", "2.13.1"),
    "2.14.1": bundled("3.11", "2.14.1"),
    "2.15.1": bundled("3.11", "2.15.1"),
    "2.16.2-k3.0.5": keras_3("2.16.2", "3.0.5"),
    "2.16.2-k3.2.1": keras_3("2.16.2", "3.2.1"),
    "2.16.2-k3.3.3": keras_3("2.16.2", "3.3.3"),
    "2.18.1-k3.6.0": keras_3("2.18.1", "3.6.0"),
    "2.19.0-k3.7.0": keras_3("2.19.0", "3.7.0"),
    "2.19.0-k3.8.0": keras_3("2.19.0", "3.8.0"),
    "2.21.0-k3.15.1": keras_3("2.21.0", "3.15.1"),
    "2.16.2-tf_keras": legacy("2.16.2", "2.16.0"),
    "2.21.0-tf_keras": legacy("2.21.0", "2.21.0"),
}


def interpreter(version: str) -> str | None:
    """A Python of that minor version that can make environments."""
    places = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}*/bin/python"))
    for candidate in (sys.executable, shutil.which(f"python{version}"), *map(str, places)):
        if candidate is None:
            continue
        code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
        said = subprocess.run(
            [candidate, "-c", code], capture_output=True, text=True, check=False, timeout=60
        )
        if said.returncode == 0 and said.stdout.strip() == version:
            return candidate
    return None


def made(row: Row, folder: Path) -> str | None:
    """The interpreter of the row's environment; what went wrong is printed."""
    python = folder / "bin" / "python"
    if (folder / "done").exists():
        return str(python)
    base = interpreter(row.python)
    if base is None:
        print(f"   not run: no Python {row.python} here", flush=True)
        return None
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    # tf_keras asks for the ordinary TensorFlow, and is content with that for CPUs.
    alone = [pin for pin in row.pins if pin.startswith("tf_keras")]
    rest = [pin for pin in row.pins if pin not in alone]
    commands = [(base, "-m", "venv", "--clear", str(folder)), (*pip, *rest)]
    commands += [(*pip, "--no-deps", *alone)] if alone else []
    for command in commands:
        if subprocess.run(command, check=False, timeout=1800).returncode != 0:
            print("   not run: it could not be installed", flush=True)
            return None
    (folder / "done").touch()
    return str(python)


def facts_of(python: str, row: Row) -> Facts:
    """What this version is seen to have and to do."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "2", **row.environment}
    program = str(ROOT / "tests" / "doctor_facts.py")
    ended = subprocess.run(
        [python, program], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    facts: Facts = json.loads(ended.stdout.splitlines()[-1])
    outcome = run_probe("on_tensorflow", python, 300, lambda _: None, dict(row.environment))
    assert not outcome.trouble(), (outcome.trouble(), outcome.complaint)
    facts["tried"] = tried_layers(outcome)
    facts["fit"] = two_workers(python, program, environment)
    return facts


def two_workers(python: str, program: str, environment: dict[str, str]) -> bool:
    """Whether `fit` of two workers ends well; both are ended if one fails or is late."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = []
    with tempfile.TemporaryFile() as output, contextlib.ExitStack() as stack:
        for index in range(2):
            config = {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            }
            process = subprocess.Popen(
                [python, program, "fit"],
                env={**environment, "TF_CONFIG": json.dumps(config)},
                stdout=output,
                stderr=output,
            )
            stack.callback(_end, process)
            processes.append(process)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                break
            time.sleep(0.2)
        codes = [process.poll() for process in processes]
        output.seek(0)
        if any(code != 0 for code in codes):
            last = [line for line in output.read().decode(errors="replace").splitlines() if line]
            print(f"   fit of two workers: {codes}: {last[-1][:200] if last else ''}", flush=True)
    return codes == [0, 0]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=[])
    parser.add_argument("--environments", type=Path)
    arguments = parser.parse_args()
    results: dict[str, str] = {}
    for name in arguments.rows or ROWS:
        row = ROWS[name]
        print(f"== {name}: {row.subject}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = (arguments.environments or Path(scratch)) / name
            python = made(row, folder)
            if python is None:
                results[name] = "not run"
                continue
            found = departures(row.subject, facts_of(python, row))
        for line in found:
            print(f"   {line}", flush=True)
        results[name] = "departs" if found else "as the table says"
    for name, result in results.items():
        print(f"{name:18} {result}")
    return 1 if "departs" in results.values() else 0


if __name__ == "__main__":
    sys.exit(main())
