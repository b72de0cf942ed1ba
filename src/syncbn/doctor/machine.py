"""What is installed and set on this machine, without importing any of it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from syncbn.doctor.findings import Finding

__all__ = ["BACKENDS", "Machine", "look"]

BACKENDS = ("tensorflow", "jax", "torch")
# Every distribution that puts a package `tensorflow` in place.
_TENSORFLOWS = (
    *("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-macos", "tensorflow-intel"),
    *("tensorflow-rocm", "tf-nightly", "tf-nightly-cpu", "intel-tensorflow"),
)
_OTHERS = ("keras", "tf_keras", "jax", "jaxlib", "torch", "numpy", "syncbn")
_TRUE = ("1", "true")


@dataclass(frozen=True)
class Machine:
    """Versions and settings.

    Attributes:
        versions: of each package that is installed, by name; "tensorflow" whatever its
            distribution is called; None where a package is there that says no version.
        distributions: those that hold TensorFlow, with their versions.
        backend: what Keras 3 runs on here.
        backend_by: what says so.
        legacy: whether TF_USE_LEGACY_KERAS is set.
        findings: what is wrong with that.
    """

    versions: dict[str, str | None]
    distributions: dict[str, str]
    backend: str
    backend_by: str
    legacy: bool
    findings: tuple[Finding, ...]

    def has(self, package: str) -> bool:
        """Whether there is such a package, working or not."""
        return package in self.versions


def look(environment: Mapping[str, str] = os.environ) -> Machine:
    """Read what is installed and set."""
    distributions = {
        name: version for name in _TENSORFLOWS if (version := _version(name)) is not None
    }
    versions: dict[str, str | None] = {"python": platform.python_version()}
    if distributions or _is_there("tensorflow"):
        versions["tensorflow"] = next(iter(distributions.values()), None)
    for name in _OTHERS:
        version = _version(name)
        if version is not None or _is_there(name):
            versions[name] = version
    # Where it runs from a folder no package says its version.
    versions["syncbn"] = sys.modules["syncbn"].__version__
    legacy = environment.get("TF_USE_LEGACY_KERAS", "").lower() in _TRUE
    findings: list[Finding] = []
    backend, backend_by = _backend(environment, findings)
    machine = Machine(versions, distributions, backend, backend_by, legacy, ())
    findings += _conflicts(machine)
    return Machine(versions, distributions, backend, backend_by, legacy, tuple(findings))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_there(package: str) -> bool:
    """Whether it can be found; a top-level package is not imported for that."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a module of that name that was put in by hand
        return False


def _backend(environment: Mapping[str, str], findings: list[Finding]) -> tuple[str, str]:
    """What Keras 3 would run on, as keras/src/backend/config.py decides, and what says so."""
    backend, by = "tensorflow", "Keras's default"
    home = environment.get("KERAS_HOME")
    path = Path(home) if home else Path("~/.keras").expanduser()
    path /= "keras.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        if isinstance(config, dict):
            backend, by = str(config.get("backend", backend)), str(path)
        else:
            findings.append(
                Finding(
                    "error",
                    "keras.json",
                    f"{path} requires an object. Received: {config!r}, of which Keras dies.",
                    "Correct or delete it.",
                )
            )
    except FileNotFoundError:
        pass  # it is not needed
    except (OSError, ValueError) as error:
        findings.append(
            Finding(
                "warning",
                "keras.json",
                f"{path} cannot be read: {error}. Keras takes no notice of it.",
                "Correct or delete it.",
            )
        )
    if environment.get("KERAS_BACKEND"):
        backend, by = environment["KERAS_BACKEND"], "KERAS_BACKEND"
    if backend not in BACKENDS:
        why = "only infers" if backend == "openvino" else "no Keras knows"
        findings.append(
            Finding(
                "error",
                by,
                f"Keras is to run on {backend!r}, which {why}.",
                f"Set KERAS_BACKEND to one of {', '.join(BACKENDS)}.",
            )
        )
    return backend, by


def _conflicts(machine: Machine) -> list[Finding]:
    """What is installed or set and does not go together."""
    found = [*_of_packages(machine), *(_of_legacy(machine) if machine.legacy else ())]
    if machine.backend in BACKENDS and not machine.has(machine.backend) and not machine.legacy:
        found.append(
            Finding(
                "error",
                machine.backend_by,
                f"Keras is to run on {machine.backend}, which is not installed.",
                f"pip install 'syncbn[{machine.backend}]', or set KERAS_BACKEND to what is there.",
            )
        )
    return found


def _of_packages(machine: Machine) -> Iterator[Finding]:
    tensorflow, keras = machine.versions.get("tensorflow"), machine.versions.get("keras")
    tf_keras = machine.versions.get("tf_keras")
    several = machine.distributions
    # On Windows, and on macOS, `tensorflow` only asks for the one that holds the files.
    asks = {"tensorflow-intel", "tensorflow-macos"} & {*several}
    if len(several) > 1 and (len({*several.values()}) > 1 or not asks):
        listed = ", ".join(f"{name} {version}" for name, version in several.items())
        says = f"Several packages hold the same files: {listed}."
        yield Finding("warning", "TensorFlow", says, "Uninstall all of them, then install one.")
    if tensorflow and keras and _minor(tensorflow) < (2, 16) and _minor(keras) >= (3, 0):
        yield Finding(
            "error",
            "Keras",
            f"Keras {keras} needs TensorFlow 2.16 or later; TensorFlow {tensorflow} is here, whose "
            "tf.keras is Keras 2.",
            "Upgrade TensorFlow, or install the keras of TensorFlow's own number.",
        )
    if tensorflow and keras and _minor(tensorflow) >= (2, 16) and _minor(keras) < (3, 0):
        says = f"TensorFlow {tensorflow} needs Keras 3; Keras {keras} is here."
        yield Finding("error", "Keras", says, "pip install --upgrade keras")
    if tensorflow and tf_keras and _minor(tensorflow) != _minor(tf_keras):
        yield Finding(
            "warning",
            "tf_keras",
            f"tf_keras {tf_keras} is of another release than TensorFlow {tensorflow}.",
            f"pip install 'tf_keras~={'.'.join(tensorflow.split('.')[:2])}.0'",
        )


def _of_legacy(machine: Machine) -> Iterator[Finding]:
    about, tensorflow = "TF_USE_LEGACY_KERAS", machine.versions.get("tensorflow")
    if tensorflow and _minor(tensorflow) < (2, 16):
        yield Finding("note", about, f"Of no effect: TensorFlow {tensorflow} has Keras 2.")
    elif not machine.has("tf_keras"):
        says = "It makes tf.keras be tf_keras, which is not installed."
        yield Finding("error", about, says, "pip install tf_keras, or unset TF_USE_LEGACY_KERAS.")
    if machine.backend != "tensorflow":
        says = (
            "tf.keras is Keras 2 and runs on TensorFlow, while Keras 3 is to run on "
            f"{machine.backend} ({machine.backend_by})."
        )
        yield Finding("warning", about, says, "Unset one of them.")


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
