"""The golden vectors as one file: an array of each name, the rest of a case as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.golden.cases import Vectors, cases, vectors_of
from tests.harness import Case

FILE = Path(__file__).parent / "vectors.npz"

_OF_REPLICAS = ("parts", "cotangents", "masks", "weights")
_OF_LAYER = ("axis", "epsilon", "momentum", "options")


def arrays() -> dict[str, np.ndarray]:
    """What the file holds, computed now: `name/field`, `name/field/replica`."""
    result: dict[str, np.ndarray] = {}
    for name, case in cases().items():
        vectors = vectors_of(case)
        about = {field: getattr(vectors.case, field) for field in _OF_LAYER}
        # A mapping that cannot be written to is none for JSON.
        result[f"{name}/about"] = np.array(json.dumps(about, default=dict))
        fields = {field: getattr(vectors.case, field) for field in (*_OF_REPLICAS, "gamma", "beta")}
        for field, value in (fields | vectors._asdict()).items():
            if isinstance(value, np.ndarray):
                result[f"{name}/{field}"] = value
            elif isinstance(value, list):
                for replica, own in enumerate(value):
                    result[f"{name}/{field}/{replica}"] = own
    return result


def read() -> dict[str, Vectors]:
    """The vectors of the file, by the name of the case."""
    with np.load(FILE) as stored:
        return {
            key.removesuffix("/about"): _vectors(stored, key.removesuffix("/about"))
            for key in stored.files
            if key.endswith("/about")
        }


def _vectors(stored: np.lib.npyio.NpzFile, name: str) -> Vectors:
    def of_replicas(field: str) -> list[np.ndarray]:
        found = [key for key in stored.files if key.startswith(f"{name}/{field}/")]
        return [stored[f"{name}/{field}/{replica}"] for replica in range(len(found))]

    layer = json.loads(str(stored[f"{name}/about"]))
    of_step = {field: of_replicas(field) or None for field in _OF_REPLICAS}
    case = Case(gamma=stored[f"{name}/gamma"], beta=stored[f"{name}/beta"], **of_step, **layer)
    expected = {
        field: of_replicas(field) if field in Vectors._fields[1:3] else stored[f"{name}/{field}"]
        for field in Vectors._fields[1:]
    }
    return Vectors(case, **expected)


def write() -> None:
    np.savez_compressed(FILE, **arrays())
