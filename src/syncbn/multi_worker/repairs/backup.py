"""BackupAndRestore on several workers: weights and epoch written as one, the chief's for everyone.

Keras writes the weights, then the epoch; a worker killed in between restores the weights of one
epoch as those of another. Here the file of the epoch also names the file of the weights that it
belongs to, and replacing it is the one moment at which the new backup takes effect:

1. the weights are written to a file of a new name;
2. the epoch, with that name, replaces `training_metadata.json`;
3. the weights replace `latest.weights.h5`, where Keras reads them.

Killed before 2, the old pair stands. Killed after it, restoring does 3.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.utils import file_utils

from syncbn.errors import WorkerError
from syncbn.multi_worker.board import agree
from syncbn.multi_worker.replicas import is_multi_worker, worker_index

__all__ = ["complete", "restoring", "saving", "send_variables"]

ENDING = ".weights.h5"


def saving(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """`BackupAndRestore._save_model`: on the chief, both files as one."""

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
    folder = Path(callback.backup_dir)
    folder.mkdir(parents=True, exist_ok=True)
    complete(callback)
    latest, metadata = Path(callback._weights_path), Path(callback._training_metadata_path)
    if callback.double_checkpoint:
        for path, previous in (
            (latest, callback._prev_weights_path),
            (metadata, callback._prev_training_metadata_path),
        ):
            if path.exists():
                file_utils.copy(str(path), previous)
    new = folder / f"new-{uuid.uuid4().hex}{ENDING}"
    callback.model.save_weights(str(new), overwrite=True)
    content = {
        "epoch": callback._current_epoch,
        "batch": callback._last_batch_seen,
        "weights": new.name,
    }
    beside = metadata.with_name(f"{metadata.name}.new")
    beside.write_text(json.dumps(content))
    beside.replace(metadata)
    new.replace(latest)


def complete(callback: Any) -> None:
    """Finish a backup that was interrupted after it took effect; drop one that was before."""
    folder = Path(callback.backup_dir)
    metadata = Path(callback._training_metadata_path)
    if file_utils.is_remote_path(str(folder)) or not folder.is_dir():
        return
    named = json.loads(metadata.read_text()).get("weights") if metadata.exists() else None
    if named and (folder / named).exists():
        (folder / named).replace(callback._weights_path)
    for path in folder.glob(f"new-*{ENDING}"):
        path.unlink(missing_ok=True)


def restoring(original: Callable[..., None]) -> Callable[..., None]:
    """`BackupAndRestore.on_train_begin`: what the chief finds, on every worker."""

    @functools.wraps(original)
    def on_train_begin(callback: Any, logs: Any = None) -> None:
        model = callback.model
        strategy = model.distribute_strategy
        if not is_multi_worker(strategy):
            return original(callback, logs)
        is_chief = worker_index(strategy) == 0
        if is_chief:
            complete(callback)
        found = is_chief and file_utils.exists(callback._weights_path)
        found = agree(strategy, "BackupAndRestore: whether there is a backup", found)
        if found and model.optimizer is not None and not model.optimizer.built:
            with strategy.scope():  # on all workers: new variables are broadcast
                model.optimizer.build(model.trainable_variables)
        failure: Exception | None = None
        if is_chief:
            try:
                original(callback, logs)
            except (OSError, ValueError) as error:
                failure = error
        outcome = {"epoch": model._initial_epoch, "failure": failure and str(failure)}
        outcome = agree(strategy, "BackupAndRestore: the epoch of the backup", outcome)
        if failure is not None:
            raise failure
        if outcome["failure"]:
            raise WorkerError(
                "Resuming requires that the chief can load its backup. "
                f"Received: it could not: {outcome['failure']}"
            )
        model._initial_epoch = outcome["epoch"]
        if found:
            send_variables(model, strategy)
        return None

    return on_train_begin


def send_variables(model: Any, strategy: Any) -> None:
    """Give every worker the chief's variables of the model and the optimizer.

    By sums of the chief's values and zeros: one a dtype, and no file that all must be able to read.
    """
    variables = [*model.variables]
    if model.optimizer is not None:
        known = {id(variable) for variable in variables}
        variables += [v for v in model.optimizer.variables if id(v) not in known]
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
