"""Callbacks that write: the chief alone, each file whole, and the chief's backup for everyone.

Keras's callbacks write on every worker. Given one path, the workers write over each other's files,
or fail at their locks. Saving takes no collective, so that the others need not take part.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keras import callbacks
from keras.src.models.model import Model
from keras.src.utils import file_utils

from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.repairs import backup
from syncbn.multi_worker.replicas import is_multi_worker, worker_index

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras writes a checkpoint whoever it is."""
    return source_probe(
        "keras.src.callbacks.model_checkpoint.ModelCheckpoint._save_model",
        broken="if self.save_weights_only: self.model.save_weights(filepath, overwrite=True)",
    )


def patches() -> list[Patch]:
    """The callbacks that write, and the model's two ways of saving."""
    silent = [
        *(
            (callbacks.CSVLogger, hook)
            for hook in ("on_train_begin", "on_epoch_end", "on_train_end")
        ),
        (callbacks.RemoteMonitor, "on_epoch_end"),
    ]
    if hasattr(callbacks, "OrbaxCheckpoint"):  # Keras has not always had it
        silent.append((callbacks.OrbaxCheckpoint, "_save_checkpoint"))
    return [
        Patch(Model, "save", _whole),
        Patch(Model, "save_weights", _whole),
        Patch(callbacks.ModelCheckpoint, "_save_model", _deciding_alike),
        *(Patch(owner, method, _on_the_chief) for owner, method in silent),
        Patch(callbacks.TensorBoard, "set_model", _into_scratch),
        Patch(callbacks.TensorBoard, "on_train_end", _without_scratch),
        Patch(callbacks.BackupAndRestore, "on_train_begin", backup.restoring),
        Patch(callbacks.BackupAndRestore, "_save_model", backup.saving),
        Patch(callbacks.BackupAndRestore, "on_train_end", _on_the_chief),
    ]


def _strategy(model: Any) -> Any:
    """The strategy of several workers that a model trains with, or None."""
    strategy = getattr(model, "distribute_strategy", None)
    return strategy if strategy is not None and is_multi_worker(strategy) else None


def _is_another(callback: Any) -> bool:
    """Whether this is not the worker that writes."""
    strategy = _strategy(callback.model)
    return strategy is not None and worker_index(strategy) > 0


_only_deciding: list[bool] = []


@contextlib.contextmanager
def _deciding() -> Iterator[None]:
    _only_deciding.append(True)
    try:
        yield
    finally:
        _only_deciding.pop()


def _on_the_chief(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(callback: Any, *args: Any, **kwargs: Any) -> Any:
        return None if _is_another(callback) else original(callback, *args, **kwargs)

    return method


def _deciding_alike(original: Callable[..., Any]) -> Callable[..., Any]:
    """Every worker decides, so that `best` stays equal; the chief writes."""

    @functools.wraps(original)
    def _save_model(callback: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_another(callback):
            return original(callback, *args, **kwargs)
        with _deciding():
            return original(callback, *args, **kwargs)

    return _save_model


def _whole(original: Callable[..., Any]) -> Callable[..., Any]:
    """Written beside the file and put in its place, so that no reader meets half of it."""

    @functools.wraps(original)
    def save(model: Any, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        if _only_deciding:
            return None
        plain = not kwargs.get("max_shard_size") and kwargs.get("zipped") is not False
        overwrites = (args[0] if args else kwargs.get("overwrite", True)) is True
        if _strategy(model) is None or len(args) > 1 or not (plain and overwrites):
            return original(model, filepath, *args, **kwargs)
        name = os.fspath(filepath)
        if file_utils.is_remote_path(name) or Path(name).is_dir():
            return original(model, filepath, *args, **kwargs)
        target = Path(name)
        with scratch_beside(target) as scratch:
            result = original(model, str(scratch), *args, **kwargs)
            scratch.replace(target)
        return result

    return save


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A path in the same folder, and so on the same disk, of the same ending; gone afterwards."""
    ending = ".weights.h5" if target.name.endswith(".weights.h5") else target.suffix
    scratch = target.with_name(f".{target.name}.{os.getpid()}{ending}")
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def _into_scratch(original: Callable[..., None]) -> Callable[..., None]:
    """A place of its own, as subclasses use the writers that it opens there."""

    @functools.wraps(original)
    def set_model(callback: Any, model: Any) -> None:
        strategy = _strategy(model)
        if strategy is not None and worker_index(strategy) > 0:
            callback._syncbn_log_dir = callback.log_dir
            callback.log_dir = tempfile.mkdtemp(prefix="syncbn-tensorboard-")
        original(callback, model)

    return set_model


def _without_scratch(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def on_train_end(callback: Any, *args: Any, **kwargs: Any) -> None:
        original(callback, *args, **kwargs)
        if hasattr(callback, "_syncbn_log_dir"):
            shutil.rmtree(callback.log_dir, ignore_errors=True)
            callback.log_dir = callback._syncbn_log_dir
            del callback._syncbn_log_dir

    return on_train_end
