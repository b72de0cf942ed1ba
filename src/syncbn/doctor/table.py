"""The table of versions: what each TensorFlow and Keras has, from versions.toml."""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from syncbn.errors import InputError

__all__ = [
    "LAST_WITH_KERAS_2",
    "Defect",
    "Row",
    "Subject",
    "Table",
    "read",
    "scope_text",
    "version_of",
]

Version = tuple[int, int]

_VERSION = re.compile(r"(\d+)\.(\d+)(?:[.+-]?[0-9A-Za-z.+-]*)?")
LAST_WITH_KERAS_2 = (2, 15)


def version_of(text: str, name: str) -> Version:
    """The minor version of "2.9", "2.9.1", "2.16.0rc1", "2.16+".

    Raises:
        InputError: it is none.
    """
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"The version of {name} requires numbers, as 2.9 or 2.16.1. Received: {text!r}. Give "
            "such a number."
        )
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Subject:
    """What is asked about.

    Attributes:
        keras: "tf.keras", "keras" (which is Keras 3) or "tf_keras".
        backend: that Keras runs on.
        tensorflow: minor version, or None where it plays no part or is not there.
        version: minor version of Keras 3, or None.
    """

    keras: str
    backend: str
    tensorflow: Version | None = None
    version: Version | None = None

    @classmethod
    def of_versions(cls, tensorflow: str, keras: str | None, legacy: bool) -> Subject:
        """What somebody has who has these versions.

        Raises:
            InputError: they do not go together.
        """
        number = version_of(tensorflow, "TensorFlow")
        wanted = None if keras is None else version_of(keras, "Keras")
        if number <= LAST_WITH_KERAS_2:
            if legacy or (wanted is not None and wanted[0] >= 3):
                raise InputError(
                    f"{'--legacy' if legacy else 'Keras 3'} requires TensorFlow 2.16 or later. "
                    f"Received: TensorFlow {tensorflow}, whose Keras is its own. Leave out "
                    f"{'--legacy' if legacy else '--keras'}, or give a later TensorFlow."
                )
            return cls("tf.keras", "tensorflow", number)
        if legacy or (wanted is not None and wanted[0] < 3):
            return cls("tf_keras", "tensorflow", number)
        return cls("keras", "tensorflow", number, wanted or read().last_keras)

    def __str__(self) -> str:
        tensorflow = "" if self.tensorflow is None else f"TensorFlow {_text(self.tensorflow)}"
        if self.keras == "tf.keras":
            return tensorflow
        if self.keras == "tf_keras":
            return f"{tensorflow} with tf_keras (Keras 2)"
        keras = "Keras 3" if self.version is None else f"Keras {_text(self.version)}"
        if self.backend == "tensorflow":
            return f"{tensorflow} with {keras}" if tensorflow else keras
        return f"{keras} on {'JAX' if self.backend == 'jax' else self.backend}"


@dataclass(frozen=True)
class Row:
    """What one range of versions has; `native` are the layers that are to synchronize."""

    scope: dict[str, Any]
    native: tuple[str, ...]
    deprecated: tuple[str, ...]
    says: str
    write: str
    known: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Defect:
    """What is wrong in some ranges of versions, how that is known, and what to do instead."""

    name: str
    says: str
    instead: str
    applies: tuple[dict[str, Any], ...]
    known: str
    sources: tuple[str, ...]
    reports: tuple[str, ...]

    def where(self) -> str:
        """The versions, in words."""
        return "; ".join(scope_text(scope) for scope in self.applies)


@dataclass(frozen=True)
class Table:
    """All rows, in the order of the file."""

    rows: tuple[Row, ...]
    defects: tuple[Defect, ...]
    last_tensorflow: Version
    last_keras: Version

    def rows_of(self, subject: Subject) -> list[Row]:
        """The rows that speak of it: one, or none for what is newer than the table."""
        return [row for row in self.rows if _covers(row.scope, subject)]

    def defects_of(self, subject: Subject) -> list[Defect]:
        """What is known to be wrong there."""
        return [
            defect
            for defect in self.defects
            if any(_covers(scope, subject) for scope in defect.applies)
        ]

    def end(self) -> str:
        """Where the table ends, in words."""
        return f"TensorFlow {_text(self.last_tensorflow)} and Keras {_text(self.last_keras)}"


@functools.cache
def read() -> Table:
    """The table of this release of syncbn."""
    text = resources.files("syncbn.doctor").joinpath("versions.toml").read_text("utf-8")
    data = tomllib.loads(text)
    rows = tuple(
        Row(
            scope={k: row[k] for k in ("keras", "backend", "tensorflow", "versions") if k in row},
            native=tuple(row["native"]),
            deprecated=tuple(row["deprecated"]),
            says=row["says"],
            write=data["write"][row["write"]].strip(),
            known=row["known"],
            sources=tuple(row["sources"]),
        )
        for row in data["availability"]
    )
    defects = tuple(
        Defect(
            name=row["name"],
            says=row["says"],
            instead=row["instead"],
            applies=tuple(row["applies"]),
            known=row["known"],
            sources=tuple(row["sources"]),
            reports=tuple(row["reports"]),
        )
        for row in data["defect"]
    )
    last = [version_of(data["ends"][name], name) for name in ("tensorflow", "keras")]
    return Table(rows, defects, *last)


def _covers(scope: dict[str, Any], subject: Subject) -> bool:
    if scope["keras"] != subject.keras or scope.get("backend", "tensorflow") != subject.backend:
        return False
    asked = {"tensorflow": subject.tensorflow, "versions": subject.version}
    return all(
        # What is not known is not held against it.
        value is None or _minor(scope[key][0]) <= value <= _minor(scope[key][1])
        for key, value in asked.items()
        if key in scope
    )


def _minor(text: str) -> Version:
    return version_of(text, "the table")


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def scope_text(scope: dict[str, Any]) -> str:
    """Versions in words: "TensorFlow 2.2 to 2.11", "Keras 3.0 to 3.15 on JAX"."""
    places = {"jax": " on JAX", "torch": " on torch"}
    # Where TensorFlow's own versions are named that says it.
    if "tensorflow" not in scope:
        places["tensorflow"] = " on TensorFlow"
    backend = places.get(scope.get("backend", ""), "")
    parts = []
    if "tensorflow" in scope:
        parts.append(f"TensorFlow {_span(scope['tensorflow'])}")
    if scope["keras"] == "tf_keras":
        parts.append("tf_keras")
    elif "versions" in scope:
        parts.append(f"Keras {_span(scope['versions'])}{backend}")
    return " with ".join(parts)


def _span(ends: list[str]) -> str:
    first, last = ends
    if first == last:
        return first
    return f"up to {last}" if first == "0.0" else f"{first} to {last}"
