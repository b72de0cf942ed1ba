"""HDF5 of Keras 1 to 3: `model.save("….h5")`, `save_weights("….h5")`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np

from syncbn.checkpoints.configs import Described, described
from syncbn.checkpoints.saved import Saved, SavedLayer, leaf_name
from syncbn.errors import InputError

__all__ = ["array_of", "child", "count", "is_legacy", "read_legacy"]


def is_legacy(file: Any) -> bool:
    """Whether the file lists the names of its layers, as Keras did before its `.keras` format."""
    return "model_weights" in file or _has_attribute(file, "layer_names")


def read_legacy(file: Any) -> Saved:
    """The layers of a whole model or of weights alone, in the file's order."""
    weights = child(file, "model_weights") if "model_weights" in file else file
    config = _config(file)
    layers: list[SavedLayer] = []
    for name in _attribute(weights, "layer_names"):
        layers += _layers_of(child(weights, name), name, config)
    if "top_level_model_weights" in weights:
        layers += _layers_of(child(weights, "top_level_model_weights"), "", config)
    left = []
    if "optimizer_weights" in file:
        slots = len(_attribute(child(file, "optimizer_weights"), "weight_names"))
        left.append(f"optimizer_weights: {slots} arrays of the optimizer")
    version = weights.attrs.get("keras_version", file.attrs.get("keras_version"))
    return Saved(
        "HDF5 of a whole model" if weights is not file else "HDF5 of weights",
        tuple(_distinct(layers)),
        ordered=True,
        keras_version=None if version is None else _text(version),
        left_out=tuple(left),
        has_config=bool(config),
        classes=config.normalizations(),
    )


def _layers_of(group: Any, name: str, config: Described) -> Iterator[SavedLayer]:
    """The layers in one group: of a model in the model all of its own, by the names of weights."""
    by_prefix: dict[str, dict[str, np.ndarray]] = {}
    for weight in _attribute(group, "weight_names"):
        prefix = weight.rpartition("/")[0]
        by_prefix.setdefault(prefix, {})[leaf_name(weight)] = array_of(group, weight)
    for prefix, arrays in by_prefix.items():
        own = prefix.rsplit("/", 1)[-1] or name
        one = config.layer(own)
        path = f"{name}/{prefix}" if prefix and prefix != name else name or prefix
        yield SavedLayer(path, arrays, own, one and one[0], one and one[1])


def _distinct(layers: list[SavedLayer]) -> Iterator[SavedLayer]:
    """Each layer once: one that two models share is written with each."""
    seen: dict[str, SavedLayer] = {}
    for layer in layers:
        key = "/".join(layer.path.split("/")[1:]) or layer.path
        other = seen.setdefault(key, layer)
        same = other.arrays.keys() == layer.arrays.keys() and all(
            np.array_equal(other.arrays[name], array) for name, array in layer.arrays.items()
        )
        if other is layer or not same or other.path == layer.path:
            yield layer


def _config(file: Any) -> Described:
    if "model_config" not in file.attrs:
        return Described(())
    return described(json.loads(_text(file.attrs["model_config"])))


def child(group: Any, name: str) -> Any:
    """What lies in the group, in this very file: a link to another one is refused.

    Raises:
        InputError: there is nothing of this name; a link that leads out of the file.
    """
    try:
        link = group.get(name, getlink=True)
        found = group.get(name)
    except (KeyError, ValueError):
        found = None
    if found is None or isinstance(link, h5py.ExternalLink):
        raise InputError(
            f"load_weights requires a file with all that it lists. Received: no {name!r} in "
            f"{group.name!r} of {group.file.filename!r}, or a link to another file. Save it anew."
        )
    return found


def array_of(group: Any, name: str) -> np.ndarray:
    """A data set as NumPy has it, bit for bit.

    Raises:
        InputError: its values lie outside of the file.
    """
    data = child(group, name)
    if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
        raise InputError(
            f"load_weights requires arrays in the file itself. Received: {data.name!r}, which is "
            "none, or lies in another file. Save it anew."
        )
    array = np.asarray(data[()])
    if data.attrs.get("dtype") == "bfloat16":  # Keras 3 writes two bytes each
        import ml_dtypes

        array = array.view(ml_dtypes.bfloat16)
    return array


def count(group: Any) -> int:
    """How many arrays lie in a group and below it."""
    if isinstance(group, h5py.Dataset):
        return 1
    return sum(count(child(group, name)) for name in group)


def _has_attribute(group: Any, name: str) -> bool:
    return name in group.attrs or f"{name}0" in group.attrs


def _attribute(group: Any, name: str) -> list[str]:
    """A list of names; one that is too long for HDF5 is cut into `name0`, `name1` and so on."""
    attributes: Mapping[str, Any] = group.attrs
    if name in attributes:
        return [_text(value) for value in attributes[name]]
    parts: list[str] = []
    number = 0
    while f"{name}{number}" in attributes:
        parts += [_text(value) for value in attributes[f"{name}{number}"]]
        number += 1
    return parts


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
