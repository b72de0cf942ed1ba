"""`load_weights`: a checkpoint of the past into a model of today, all of it or nothing."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from syncbn.checkpoints.graph import prefix_of, read_graph
from syncbn.checkpoints.hdf5 import is_legacy, read_legacy
from syncbn.checkpoints.matching import Pair, match, pairs_by_names
from syncbn.checkpoints.notes import notes_on
from syncbn.checkpoints.report import CheckpointWarning, LoadReport, Restored
from syncbn.checkpoints.saved import Saved
from syncbn.checkpoints.slots import OPTIONAL, Slot, slots_of
from syncbn.checkpoints.store import read_keras, read_store
from syncbn.checkpoints.torch_state import is_torch, read_torch
from syncbn.errors import InputError

__all__ = ["load_weights"]


def load_weights(
    model: Any,
    path: Any,
    *,
    names: Mapping[str, str] | None = None,
    by: str | None = None,
    part: str | None = None,
    partial: bool = False,
) -> LoadReport:
    """Load the weights of a checkpoint of the past into a model of Keras 3, on any backend.

    The model is made anew by its code of today, with SyncBatchNormalization or plain
    BatchNormalization, whichever the file had. Names of layers may have other numbers than in the
    file. Every layer with weights on either side must have its own on the other, of its kind and
    shapes: all is compared before anything is assigned, and what does not fit is one error. Values
    come bit for bit. Nothing in a file is executed.

    Formats, told by content:
        `.keras` of Keras 2.12 to 3; HDF5 of Keras 1 to 3, of a whole model or of weights;
        `.weights.h5` of both layouts; TensorFlow 2's checkpoints of `save_weights`,
        `tf.train.Checkpoint` and SavedModel (needs TensorFlow, also where Keras runs on another
        backend); torch's `state_dict`, as a mapping, `.pt`/`.pth` (needs torch; no pickled
        objects) or `.safetensors`.

    Of torch's modules, `names` gives the prefix for every layer: `{"stem_norm": "layer1.bn"}`.
    BatchNorm and SyncBatchNorm: weight, bias, running_mean, running_var and, for `momentum=None`,
    num_batches_tracked. Linear, Conv, ConvTranspose (transposed to Keras's order), Embedding,
    LayerNorm and GroupNorm too. torch's `running_var` is of the unbiased variance, n/(n − 1) of
    Keras's, and is loaded as it is: `unbiased_moving_variance=True` goes on with it. Its momentum
    is 1 − Keras's, and its default epsilon 1e-5, Keras's 1e-3; a `state_dict` has neither.

    Args:
        model: a built `keras.Model`: functional, sequential, nested, subclassed.
        path: the file, the prefix of a TensorFlow checkpoint or its folder, a SavedModel's folder;
            or a mapping from names to tensors or arrays, a `state_dict`.
        names: layers of the model, by name or path (`backbone/bn`), to those of the file, by path
            or name; the rest is matched as without. Required for torch, for every layer.
        by: "place" to match by the position in the model alone, "name" by the names; by default
            both are tried, and must agree where both fit.
        part: of a `tf.train.Checkpoint(model=…, ema=…)` the name of the object to load.
        partial: load the layers in `names` alone; the others stay.

    Returns:
        What was restored from where, what of the file was left out, notes.

    Raises:
        InputError: a file that is none of these; layers that do not fit or cannot be told apart;
            arguments that cannot be. The model is as it was.
        FileNotFoundError: there is nothing at the path.
        ModuleNotFoundError: TensorFlow or torch is needed to read the file, and not there.

    Warns:
        CheckpointWarning: once, where the file does not say whether its batch normalizations were
            synchronized (Keras 2 lost `synchronized=True` on saving), or where epsilon or axis
            differ from the file's; all of it is in the report's `notes` too.

    Examples:
        >>> report = syncbn.load_weights(model, "resnet_tf215.h5")
        >>> print(report.summary())
    """
    _check_arguments(names, by, partial)
    slots = slots_of(model)
    chosen = dict(names or {})
    if is_torch(path):
        saved, pairs = read_torch(slots, path, chosen, partial)
    else:
        readings = _read(Path(os.fspath(path)), part)
        saved, pairs = _matched(model, slots, readings, chosen, by, partial)
    notes, urgent = notes_on(saved, pairs)
    left = (*saved.left_out, *_unused(saved, pairs))
    notes += _assign(pairs)
    if urgent:
        warnings.warn(" ".join(urgent), CheckpointWarning, stacklevel=2)
    restored = tuple(Restored(p.slot.path, p.layer.path, tuple(p.arrays)) for p in pairs)
    untouched = {slot.path for slot in slots} - {pair.slot.path for pair in pairs}
    return LoadReport(
        "a state_dict" if isinstance(path, Mapping) else str(path),
        saved.format,
        saved.keras_version,
        restored,
        left,
        tuple(sorted(untouched)),
        (*urgent, *notes),
    )


def _check_arguments(names: Any, by: Any, partial: bool) -> None:
    if by not in (None, "place", "name"):
        raise InputError(f'`by` requires "place", "name" or None. Received: by={by!r}.')
    if names is not None and not isinstance(names, Mapping):
        raise InputError(
            "`names` requires a mapping from layers of the model to layers of the file. "
            f"Received: {type(names)}."
        )
    if partial and not names:
        raise InputError(
            "partial=True requires the layers to load. Received: no names. Give "
            'names={"layer of the model": "layer in the file"}.'
        )


def _read(path: Path, part: str | None) -> tuple[Saved, ...]:
    """The file, by the format that its content has."""
    if path.is_file() and zipfile.is_zipfile(path):
        return (read_keras(path),)
    if path.is_file() and h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            return (read_legacy(file) if is_legacy(file) else read_store(file),)
    prefix = prefix_of(path)
    if prefix is not None:
        return read_graph(prefix, part)
    if not path.exists():
        raise FileNotFoundError(
            f"load_weights requires a checkpoint. Received: {str(path)!r}, where nothing is, nor "
            "an .index file of TensorFlow beside it. Check the path."
        )
    raise InputError(
        "load_weights requires .keras, HDF5, a TensorFlow checkpoint, or a state_dict of torch. "
        f"Received: {str(path)!r}, which is none by its content. Give the file itself."
    )


def _matched(
    model: Any,
    slots: tuple[Slot, ...],
    readings: tuple[Saved, ...],
    names: dict[str, str],
    by: str | None,
    partial: bool,
) -> tuple[Saved, list[Pair]]:
    """The reading that fits, one alone: a `tf.train.Checkpoint` may hold several models."""
    fits: dict[frozenset[tuple[str, str]], tuple[Saved, list[Pair]]] = {}
    errors: dict[int, InputError] = {}
    for saved in readings:
        try:
            if partial:
                pairs = pairs_by_names(slots, saved, names)
            else:
                pairs = match(model, slots, saved, names, by)
        except InputError as error:
            errors.setdefault(len(saved.layers), error)
        else:  # by its names a whole checkpoint can fit, as well as its one object
            fits[frozenset((pair.slot.path, pair.layer.path) for pair in pairs)] = saved, pairs
    if len(fits) > 1:
        parts = sorted({saved.layers[0].path.split("/")[0] for saved, _ in fits.values()})
        raise InputError(
            "load_weights requires a checkpoint in which one object fits the model. Received: "
            f"{parts}, which all do. Nothing was loaded. Name one: part={parts[0]!r}."
        )
    if not fits:
        if not errors:
            raise InputError(
                "load_weights requires a file with weights of layers. Received: none in it. Check "
                "that it was saved with its weights."
            )
        raise errors[max(errors)]
    return next(iter(fits.values()))


def _unused(saved: Saved, pairs: list[Pair]) -> tuple[str, ...]:
    used = {pair.layer.path for pair in pairs}
    return tuple(layer.path for layer in saved.layers if layer.path not in used)


def _assign(pairs: list[Pair]) -> list[str]:
    """The one place that changes the model, after all has been compared."""
    notes = []
    converted: dict[tuple[str, str], int] = {}
    missing = 0
    for pair in pairs:
        for name, array in pair.arrays.items():
            variable = pair.slot.variables[name]
            ours = str(np.dtype(array.dtype).name), str(variable.dtype)
            if ours[0] != ours[1]:
                converted[ours] = converted.get(ours, 0) + 1
            variable.assign(array)
        missing += len((OPTIONAL & pair.slot.variables.keys()) - pair.arrays.keys())
        if hasattr(pair.slot.layer, "finalize_state"):
            pair.slot.layer.finalize_state()
    if missing:
        notes.append(
            f"{missing} layers with momentum=None start to count their batches anew, as the file "
            "has no num_batches_tracked: the first batch in training replaces their statistics."
        )
    notes += [f"{n} arrays were converted from {a} to {b}." for (a, b), n in converted.items()]
    return notes
