"""torch's `state_dict`: by names that the user gives, in Keras's order of axes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from syncbn.checkpoints.matching import Pair, refuse
from syncbn.checkpoints.saved import Saved, SavedLayer
from syncbn.checkpoints.slots import OPTIONAL, Slot
from syncbn.errors import InputError

__all__ = ["is_torch", "read_torch"]

_PICKLES = (".pt", ".pth", ".bin")
_FORMAT = "torch state_dict"


def is_torch(path: Any) -> bool:
    """Whether it is a `state_dict`, or a file that torch or safetensors writes, by its name."""
    return isinstance(path, Mapping) or str(path).endswith((*_PICKLES, ".safetensors"))


def _convolution(weight: np.ndarray) -> np.ndarray:
    """(out, in / groups, *kernel) → (*kernel, in / groups, out)."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _transposed(weight: np.ndarray) -> np.ndarray:
    """(in, out, *kernel) → (*kernel, out, in), Keras's order for transposed convolutions."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _as_it_is(weight: np.ndarray) -> np.ndarray:
    return weight


def _depthwise(channels: int) -> Callable[[np.ndarray], np.ndarray]:
    """(in · multiplier, 1, *kernel) → (*kernel, in, multiplier)."""

    def convert(weight: np.ndarray) -> np.ndarray:
        if weight.ndim < 3 or weight.shape[1] != 1 or weight.shape[0] % channels:
            return weight  # its shape is then said to be wrong
        parts = weight[:, 0].reshape(channels, -1, *weight.shape[2:])
        return np.moveaxis(parts, (0, 1), (-2, -1))

    return convert


Rules = dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]

_NORM: Rules = {"gamma": ("weight", _as_it_is), "beta": ("bias", _as_it_is)}
_MOVING: Rules = {
    "moving_mean": ("running_mean", _as_it_is),
    "moving_variance": ("running_var", _as_it_is),
    "num_batches_tracked": ("num_batches_tracked", _as_it_is),
}
_BIAS: Rules = {"bias": ("bias", _as_it_is)}


def _rules(slot: Slot) -> Rules | None:
    """Which tensor each weight of a layer is, and how its axes are moved; None for other layers."""
    layers = keras.layers
    layer = slot.layer
    if isinstance(layer, layers.BatchNormalization):
        return _NORM | _MOVING
    if isinstance(layer, (layers.LayerNormalization, layers.GroupNormalization)):
        return _NORM
    if isinstance(layer, layers.Embedding):
        return {"embeddings": ("weight", _as_it_is)}
    if isinstance(layer, layers.Dense):
        return _BIAS | {"kernel": ("weight", np.transpose)}
    if isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)):
        channels = int(slot.variables["kernel"].shape[-2])
        return _BIAS | {"kernel": ("weight", _depthwise(channels))}
    transposed = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
    if isinstance(layer, transposed):
        return _BIAS | {"kernel": ("weight", _transposed)}
    separable = (layers.SeparableConv1D, layers.SeparableConv2D)
    if isinstance(layer, (layers.Conv1D, layers.Conv2D, layers.Conv3D)) and not isinstance(
        layer, separable
    ):
        return _BIAS | {"kernel": ("weight", _convolution)}
    return None


def read_torch(
    slots: Sequence[Slot], source: Any, names: Mapping[str, str], partial: bool
) -> tuple[Saved, list[Pair]]:
    """The tensors for every layer named, already as Keras has them.

    Raises:
        InputError: layers without a name, of a kind without a rule; tensors that are missing, or
            of another shape; nothing that is a `state_dict`.
    """
    state, notes = _state(source)
    saved = Saved(_FORMAT, (), ordered=False)
    by_slot, problems = _chosen(slots, names)
    if not partial:
        problems += [
            f"{slot.path}, which `names` gives no prefix for"
            for slot in slots
            if id(slot) not in by_slot
        ]
    pairs = []
    for slot in slots:
        if id(slot) in by_slot:
            arrays, wrong = _arrays(slot, state, by_slot[id(slot)])
            problems += wrong
            pairs.append(Pair(slot, SavedLayer(by_slot[id(slot)], arrays), arrays))
    if problems:
        refuse(saved, problems)
    used = {f"{pair.layer.path}." for pair in pairs}
    left = [key for key in state if f"{key.rpartition('.')[0]}." not in used]
    return saved._replace(left_out=(*left, *notes)), pairs


def _chosen(slots: Sequence[Slot], names: Mapping[str, str]) -> tuple[dict[int, str], list[str]]:
    """The prefix of each layer's tensors."""
    by_slot: dict[int, str] = {}
    problems = []
    for ours, prefix in names.items():
        found = [s for s in slots if s.path == ours] or [s for s in slots if s.name == ours]
        if len(found) == 1:
            by_slot[id(found[0])] = str(prefix).removesuffix(".")
        else:
            problems.append(f"{ours!r} in `names` is {len(found)} layers of the model")
    return by_slot, problems


def _arrays(
    slot: Slot, state: Mapping[str, np.ndarray], prefix: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    rules = _rules(slot)
    if rules is None or not slot.variables.keys() <= rules.keys():
        kind = type(slot.layer).__name__
        others = sorted(slot.variables.keys() - (rules or {}).keys())
        return {}, [f"{slot.path}, a {kind} with {', '.join(others)}, which torch's modules lack"]
    arrays: dict[str, np.ndarray] = {}
    problems = []
    for name, variable in slot.variables.items():
        theirs, convert = rules[name]
        key = f"{prefix}.{theirs}"
        if key not in state:
            if name not in OPTIONAL:
                problems.append(f"{key} for {slot.path}/{name}, not in the file")
            continue
        array = convert(state[key])
        if array.shape != tuple(variable.shape):
            problems.append(
                f"{key} of shape {state[key].shape} for {slot.path}/{name} of shape "
                f"{tuple(variable.shape)}"
            )
        arrays[name] = array
    known = {f"{prefix}.{theirs}" for theirs, _ in rules.values()}
    known -= {f"{prefix}.{rules[name][0]}" for name in slot.variables}
    for key in known & state.keys():
        if not key.endswith("num_batches_tracked"):  # of use with momentum=None alone
            problems.append(f"{key}, which {slot.path} has no weight for")
    return arrays, problems


def _state(source: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors by name, of a file or a mapping that may hold them under a name of its own."""
    notes: list[str] = []
    loaded = source if isinstance(source, Mapping) else _load(Path(source))
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded.get(key), Mapping):
            notes += [str(other) for other in loaded if other != key]
            loaded = loaded[key]
            break
    others = [key for key, value in loaded.items() if not hasattr(value, "shape")]
    if others or not loaded:
        raise InputError(
            "load_weights requires a state_dict, names with tensors or arrays. Received: "
            f"{others[:5] or 'an empty one'}. Give model.state_dict()."
        )
    if all(key.startswith("module.") for key in loaded):  # of DistributedDataParallel
        loaded = {key.removeprefix("module."): value for key, value in loaded.items()}
    return {str(key): _array(value) for key, value in loaded.items()}, notes


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # exact in float32, and NumPy has none
            value = value.float()
        return np.asarray(value.numpy())
    return np.asarray(value)


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"load_weights requires a checkpoint. Received: {str(path)!r}, where nothing is. Check "
            "the path."
        )
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A file of torch requires the package torch to be read. Received: no such package. "
            "Install it: pip install 'syncbn[torch]'; or save the state_dict as .safetensors.",
            name="torch",
        ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            "load_weights requires a file of torch with tensors alone; nothing else is unpickled. "
            f"Received: {str(path)!r}: {str(error).splitlines()[0]} Save model.state_dict()."
        ) from error
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"load_weights requires a state_dict. Received: {type(loaded)} in {str(path)!r}. Save "
            "model.state_dict()."
        )
    return loaded


_SAFETENSORS = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"},
    **{"I8": "i1", "U8": "u1", "BOOL": "?", "BF16": "<u2"},
}


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    """8 bytes with the size of a header of JSON, the header, the numbers."""
    data = path.read_bytes()
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        arrays = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                numbers = np.frombuffer(
                    data[8 + size + start : 8 + size + end], _SAFETENSORS[entry["dtype"]]
                )
                if entry["dtype"] == "BF16":  # the upper half of a float32
                    numbers = (numbers.astype("<u4") << 16).view("<f4")
                arrays[name] = numbers.reshape(entry["shape"])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"load_weights requires a .safetensors file as it was written. Received: {str(path)!r}:"
            f" {error!r}. Copy it anew."
        ) from error
    return arrays
