"""BackupAndRestore on several workers: the chief's backup, whole, for everyone.

The chief alone writes (see `backup_files`) and reads; what it finds, and what is wrong with it, is
told to the others, so that none waits for a chief that cannot go on. Beside Keras's weights and
epoch a backup holds what else the next epoch depends on: the states of the random numbers, and the
seed of the fit.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from keras import optimizers
from keras.src.models.model import Model
from keras.src.saving import saving_lib
from keras.src.utils import file_utils

from syncbn.errors import InputError, WorkerError
from syncbn.multi_worker import backup_files, fits
from syncbn.multi_worker.backup_files import Backup, DamageError, Files
from syncbn.multi_worker.board import agree, exchange
from syncbn.multi_worker.h5_sink import Sink
from syncbn.multi_worker.replicas import is_multi_worker, worker_index

__all__ = ["restoring", "saving", "send_variables"]

# What Keras raises on a file that is not of this model, or no file of weights.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, UserWarning)


def saving(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """`BackupAndRestore._save_model`: on the chief, both files as one; a full disk is a warning."""

    @functools.wraps(original)
    def _save_model(callback: Any) -> None:
        strategy = callback.model.distribute_strategy
        if not is_multi_worker(strategy):
            return original(callback)
        if worker_index(strategy) > 0:
            return None
        if file_utils.is_remote_path(str(callback.backup_dir)):
            return original(callback)  # without a rename there is nothing better
        return _save(callback)

    return _save_model


def _save(callback: Any) -> None:
    model, files = callback.model, Files.of(callback)
    needed = sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in _saved(model))
    fit = fits.current()
    content = {
        "epoch": callback._current_epoch,
        "batch": callback._last_batch_seen,
        "variables": _shapes(model),
        "seeds": [v.numpy().tolist() for v in _seeds(model)],
        "shuffle_seed": fit and fit.seed,
    }
    # A latest backup that was damaged must not take the place of the one that was restored.
    rotate = callback.double_checkpoint and not getattr(callback, "_syncbn_is_damaged", False)
    try:
        save = functools.partial(_save_weights, model)
        backup_files.write(files, save, content, needed=needed, rotate=rotate)
        callback._syncbn_is_damaged = False
    except OSError as error:
        # The model in memory is whole, and worth more than this copy of it.
        warnings.warn(_not_written(callback, files, error, needed), stacklevel=4)


def _save_weights(model: Any, path: Path) -> None:
    if type(model).save_weights is not Model.save_weights:
        model.save_weights(str(path))  # a model with a way of its own
        return
    with Sink(path) as sink:
        saving_lib.save_weights_only(model, sink)
    if sink.error is not None:
        raise sink.error


def _not_written(callback: Any, files: Files, error: OSError, needed: int) -> str:
    free = backup_files.free_bytes(files.folder)
    try:
        standing = backup_files.read(files.latest)
    except (DamageError, OSError):
        standing = None
    stands = f"that of epoch {standing.content['epoch']} stands" if standing else "there is none"
    return (
        f"The backup of epoch {callback._current_epoch} could not be written to {files.folder}: "
        f"{error.strerror or error}. It needs {needed} bytes"
        f"{'' if free is None else f', and {free} are free'}; {stands}. Training goes on, "
        "and the next backup will be tried. Make room there."
    )


def restoring(original: Callable[..., None]) -> Callable[..., None]:
    """`BackupAndRestore.on_train_begin`: what the chief finds, on every worker."""

    @functools.wraps(original)
    def on_train_begin(callback: Any, logs: Any = None) -> None:
        model = callback.model
        strategy = model.distribute_strategy
        if not is_multi_worker(strategy):
            return original(callback, logs)
        if not model.built:
            raise InputError(
                "BackupAndRestore requires a model that is built before fit(). Received: "
                f"{model.name!r}, which is not. Call it on a batch, or build(), first."
            )
        model._initial_epoch = None  # of a fit before, which Keras would begin at again
        if not _is_there(callback, strategy):
            return None
        if model.optimizer is not None and not model.optimizer.built:
            with strategy.scope():  # on all workers: new variables are broadcast
                model.optimizer.build(model.trainable_variables)
        outcome: dict[str, Any] = {}
        if worker_index(strategy) == 0:
            is_remote = file_utils.is_remote_path(str(callback.backup_dir))
            outcome = _from_remote(original, callback) if is_remote else _restore(callback)
        outcome = agree(strategy, "BackupAndRestore: the epoch of the backup", outcome)
        _raise_failure(strategy, outcome)
        if outcome.get("warning"):
            warnings.warn(outcome["warning"], stacklevel=2)
        _go_on(model, strategy, outcome)
        return None

    return on_train_begin


def _is_there(callback: Any, strategy: Any) -> bool:
    """Whether the chief has a backup, whole or not.

    Raises:
        InputError: no backup could be written there.
        WorkerError: the same, on the other workers.
    """
    files = Files.of(callback)
    if file_utils.is_remote_path(str(callback.backup_dir)):
        found, failure = file_utils.exists(callback._weights_path), None
    else:
        found = files.is_there()
        failure = backup_files.check_folder(files.folder) if worker_index(strategy) == 0 else None
    own: dict[str, Any] = {"found": bool(found)}
    if failure:
        own["failure"] = (
            "BackupAndRestore requires a folder that can be written to. Received: "
            f"{files.folder}: {failure}. Give it another backup_dir, or the right to write."
        )
    every = exchange(strategy, "BackupAndRestore: whether there is a backup", own)
    _raise_failure(strategy, every[0])
    elsewhere = [worker for worker, theirs in enumerate(every) if theirs["found"]]
    if elsewhere and not every[0]["found"]:
        warnings.warn(
            f"Training begins from the start: worker 0, whose backup is everyone's, has none in "
            f"{files.folder}, but worker {elsewhere[0]} has. Give worker 0 those files to resume.",
            stacklevel=4,
        )
    return bool(every[0]["found"])


def _raise_failure(strategy: Any, outcome: dict[str, Any]) -> None:
    failure = outcome.get("failure")
    if failure and worker_index(strategy) == 0:
        raise InputError(failure)
    if failure:
        raise WorkerError(f"Worker 0 could not begin, nor can this one. It says: {failure}")


def _from_remote(original: Callable[..., None], callback: Any) -> dict[str, Any]:
    """Keras's own restoring, where there are no renames and so no backup of ours."""
    try:
        original(callback)
    except UNREADABLE as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    return {"epoch": callback.model._initial_epoch}


def _restore(callback: Any) -> dict[str, Any]:
    """Load the latest backup, or the previous one in its place; what the others must know of it."""
    files = Files.of(callback)
    damage: list[str] = []
    for pair in (files.latest, files.previous):
        if pair is files.previous and not callback.double_checkpoint:
            break
        try:
            backup = backup_files.read(pair)
            if backup is not None:
                _load(callback.model, backup)
        except (DamageError, OSError) as error:
            damage.append(str(error))
            continue
        if backup is None:
            damage.append(f"no {pair.weights}")
            continue
        outcome = dict(backup.content)
        if damage:
            callback._syncbn_is_damaged = True
            outcome["warning"] = (
                f"The latest backup cannot be restored: {damage[0]}. Training resumes from the "
                f"previous one, of epoch {outcome['epoch']}."
            )
        return outcome
    keeps = "" if callback.double_checkpoint else ", or keep two by double_checkpoint=True"
    return {
        "failure": f"Resuming requires a backup that is whole and of this model. Received: "
        f"{'; and '.join(damage)}. Put the right files there, or delete {files.folder} to begin "
        f"from the start{keeps}. No file was changed."
    }


def _load(model: Any, backup: Backup) -> None:
    """The weights, on this worker.

    Raises:
        DamageError: they are not of this model, or not weights.
    """
    saved, own = backup.content.get("variables"), _shapes(model)
    if saved is not None and saved != own:
        raise DamageError(f"{backup.weights} of another model or optimizer: {_differ(saved, own)}")
    try:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            # Keras wants that ending, and leaves out an optimizer that differs with a warning.
            link = Path(scratch, "linked.weights.h5")
            link.symlink_to(backup.weights.absolute())
            warnings.filterwarnings("error", message="Skipping variable loading")
            model.load_weights(str(link))
    except UNREADABLE as error:
        raise DamageError(
            f"{backup.weights}, which cannot be loaded into this model: {type(error).__name__}: "
            f"{str(error).splitlines()[0][:300] if str(error) else ''}"
        ) from error


def _differ(saved: list[str], own: list[str]) -> str:
    if len(saved) != len(own):
        return f"it has {len(saved)} variables, and here are {len(own)}"
    number = next(i for i, pair in enumerate(zip(saved, own, strict=True)) if pair[0] != pair[1])
    return f"variable {number} of it is {saved[number]}, and here it is {own[number]}"


def _go_on(model: Any, strategy: Any, outcome: dict[str, Any]) -> None:
    """Every worker as the chief was at the end of that epoch."""
    model._initial_epoch = outcome["epoch"]
    seeds = outcome.get("seeds") or []
    for variable, value in zip(_seeds(model), seeds, strict=False):
        variable.assign(np.array(value, variable.dtype))
    fit = fits.current()
    if fit is not None and outcome.get("shuffle_seed") is not None:
        fit.seed = outcome["shuffle_seed"]
    send_variables(model, strategy)


def _optimizers(model: Any) -> list[Any]:
    """The optimizer of the model, and those that a model with a step of its own has beside."""
    found = [model.optimizer, *vars(model).values()]
    unique = {id(one): one for one in found if isinstance(one, optimizers.Optimizer)}
    return list(unique.values())


def _saved(model: Any) -> list[Any]:
    """The variables that are in a file of weights."""
    own = [*model.weights, *(v for one in _optimizers(model) for v in one.variables)]
    return list({id(variable): variable for variable in own}.values())


def _seeds(model: Any) -> list[Any]:
    """The states of the model's random numbers, which are in no file of weights."""
    return [v for v in model.variables if v.name == "seed_generator_state"]


def _shapes(model: Any) -> list[str]:
    return [f"{v.dtype}{list(v.shape)}" for v in [*_saved(model), *_seeds(model)]]


def send_variables(model: Any, strategy: Any) -> None:
    """Give every worker the chief's variables of the model and its optimizers.

    By sums of the chief's values and zeros: one a dtype, and no file that all must be able to read.
    """
    both = [*model.variables, *_saved(model)]
    variables = list({id(variable): variable for variable in both}.values())
    # Sums over replicas, such as metrics, are per worker and begin anew; strings cannot be added.
    variables = [v for v in variables if v.synchronization != "on_read" and v.dtype != "string"]
    is_chief = worker_index(strategy) == 0
    for dtype in sorted({variable.dtype for variable in variables}):
        group = [variable for variable in variables if variable.dtype == dtype]
        own = [np.asarray(variable.numpy()) for variable in group]
        wide, exact = _carrier(own)
        flat = np.concatenate([exact(value).ravel() for value in own])
        sent = _sum_over_workers(strategy, flat if is_chief else np.zeros_like(flat), wide)
        end = 0
        for variable, value in zip(group, own, strict=True):
            begin, end = end, end + value.size
            part = np.frombuffer(sent[begin:end].tobytes(), dtype=value.dtype)
            variable.assign(part.reshape(value.shape))


def _carrier(values: list[Any]) -> tuple[Any, Callable[[Any], Any]]:
    """The integers that carry the bits of a dtype: a sum with zero keeps NaN and -0.0 too."""
    bits = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[values[0].dtype.itemsize]
    return bits, lambda value: np.ascontiguousarray(value).reshape(-1).view(bits)


def _sum_over_workers(strategy: Any, flat: Any, carrier: Any) -> Any:
    """The sum of one vector a worker."""
    # CollectiveReduce has kernels for 32 and 64 bits.
    wide = flat.astype(np.int64 if carrier is np.int64 else np.int32)
    local = len(strategy.extended.worker_devices)
    zeros = np.zeros_like(wide)

    def value_of(context: Any) -> Any:
        first = context.replica_id_in_sync_group % local == 0
        return tf.constant(wide if first else zeros)

    per_replica = strategy.experimental_distribute_values_from_function(value_of)
    total = strategy.reduce(tf.distribute.ReduceOp.SUM, per_replica, axis=None)
    return np.asarray(total).astype(carrier)
