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
    """Load a checkpoint of the past into a model of Keras 3, on any backend; all or nothing.

    The model is made anew by its code of today, with SyncBatchNormalization or plain
    BatchNormalization, whichever the file had; numbers in names of layers may differ. Every layer
    with weights on either side needs its own on the other, of its kind and shapes. Values come bit
    for bit. Nothing in a file is executed. The formats, and what torch's differ in:
    `syncbn.checkpoints` and docs/how-to/checkpoints.md.

    Args:
        model: a built `keras.Model`: functional, sequential, nested, subclassed.
        path: a file, a TensorFlow checkpoint's prefix or folder, a SavedModel's folder; or a
            `state_dict`, a mapping from names to tensors.
        names: layers of the model, by name or path (`backbone/bn`), to those of the file, by path
            or name; the rest is matched as without. For torch the prefix of every layer's module.
        by: "place" to match by the position in the model alone, "name" by the names; by default
            both are tried, and must agree where both fit.
        part: of a `tf.train.Checkpoint(model=…, ema=…)` the name of the object to load.
        partial: load the layers in `names` alone; the others stay.

    Returns:
        What was restored from where, what of the file was left out, notes.

    Raises:
        InputError: no such format; layers that do not fit or cannot be told apart; arguments that
            cannot be. The model is as it was.
        FileNotFoundError: there is nothing at the path.
        ModuleNotFoundError: TensorFlow or torch is needed to read the file, and not there.

    Warns:
        CheckpointWarning: once, where the file does not say whether its batch normalizations were
            synchronized (Keras 2 lost it on saving), or other arguments differ from the file's.

    References:
        The formats as Keras 2.0 to 2.15 (`legacy_h5_format.py`, `saving_lib.py`), TensorFlow's
        `tf.train.Checkpoint` (`trackable_object_graph.proto`) and torch's `state_dict` write them.
    """
    _check_arguments(names, by, partial)
    slots = slots_of(model)
    chosen = dict(names or {})
    if is_torch(path):
        saved, pairs = read_torch(slots, path, chosen, partial)
    else:
        readings = _read(Path(os.fspath(path)), part)
        saved, pairs = _matched(model, slots, readings, chosen, by, partial)
    return _restore(path, slots, saved, pairs)


def _restore(path: Any, slots: tuple[Slot, ...], saved: Saved, pairs: list[Pair]) -> LoadReport:
    notes, urgent = notes_on(saved, pairs)
    left = (*saved.left_out, *_unused(saved, pairs))
    notes += _assign(pairs)
    if urgent:
        warnings.warn(" ".join(urgent), CheckpointWarning, stacklevel=3)
    untouched = {slot.path for slot in slots} - {pair.slot.path for pair in pairs}
    return LoadReport(
        "a state_dict" if isinstance(path, Mapping) else str(path),
        saved.format,
        saved.keras_version,
        tuple(Restored(p.slot.path, p.layer.path, tuple(p.arrays)) for p in pairs),
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
