"""Keras 3 in the workers of Ray Train: `TensorflowTrainer`, `JaxTrainer` and `TorchTrainer`.

`prepare()` comes first in the training loop, `ReportCheckpoint()` is a callback of `fit`.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

import syncbn
from syncbn.errors import InputError, NotSynchronizableError

__all__ = ["ReportCheckpoint", "prepare"]

# Ray's trainer of each of Keras's backends.
_TRAINERS = {"tensorflow": "TensorflowTrainer", "jax": "JaxTrainer", "torch": "TorchTrainer"}


def prepare(*, timeout: float | None = None) -> None:
    """Make this worker of a Ray trainer one that Keras's `fit` trains right on.

    Call it first in `train_loop_per_worker`, on every worker, before a strategy is made.

    On TensorFlow it undoes the `TF_USE_LEGACY_KERAS=1` that Ray sets, so that `tf.keras` is
    Keras 3, and calls `syncbn.enable_multi_worker(timeout=timeout)`. On JAX it calls
    `keras.distribution.initialize` with the first worker's address, unless `JaxTrainer` has done
    so (on TPUs and GPUs). On torch `TorchTrainer` has made the process group; compile the model
    and call `syncbn.average_gradients(model)`, or use Ray's `prepare_model` in a loop of your own.

    Args:
        timeout: seconds that one worker waits for another; as in `enable_multi_worker`, on
            TensorFlow alone.

    Raises:
        NotSynchronizableError: this is no worker of a trainer of Ray Train, or that of another
            framework than the one that Keras runs on.
        InputError: `tf.keras` is tf_keras here already, which cannot be undone.
        ModuleNotFoundError: Ray is not installed.

    References:
        Ray issue 47464: `TensorflowTrainer` fails with Keras 3, and so falls back to Keras 2.
    """
    rank, workers = _place()
    backend = keras.backend.backend()
    if backend == "tensorflow":
        _prepare_tensorflow(timeout)
    elif backend == "jax":
        _prepare_jax(rank, workers)
    elif backend == "torch":
        _require("RANK" in os.environ or workers == 1, "a process group")


def _ray_train() -> Any:
    try:
        train = importlib.import_module("ray.train")
        importlib.import_module("ray.train.collective")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "syncbn.integrations.ray requires Ray Train. Received: no such package "
            f"({error.name}). Install it: pip install 'syncbn[ray]'",
            name=error.name,
        ) from error
    return train


def _place() -> tuple[int, int]:
    """This worker's rank, and how many there are."""
    try:
        context = _ray_train().get_context()
        return context.get_world_rank(), context.get_world_size()
    except (RuntimeError, AttributeError) as error:
        raise NotSynchronizableError(
            "syncbn.integrations.ray requires a worker of Ray Train. Received: a process outside "
            "of train_loop_per_worker. Call it there, first of all."
        ) from error


def _require(there: bool, what: str) -> None:
    if not there:
        backend = keras.backend.backend()
        raise NotSynchronizableError(
            f"prepare() requires what Ray's {_TRAINERS[backend]} sets up for Keras on {backend}. "
            f"Received: no {what}. Train by {_TRAINERS[backend]}, or give the workers another "
            "KERAS_BACKEND: RunConfig(worker_runtime_env={'env_vars': {'KERAS_BACKEND': …}})."
        )


def _prepare_tensorflow(timeout: float | None) -> None:
    _require("TF_CONFIG" in os.environ, "TF_CONFIG")
    if "tf_keras" in sys.modules:
        raise InputError(
            "prepare() requires tf.keras to be Keras 3. Received: tf_keras, imported before. Ray "
            "sets TF_USE_LEGACY_KERAS=1: use `import keras`, and take Ray's own Keras callback out "
            "of the program; syncbn.integrations.ray.ReportCheckpoint does what it did."
        )
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    syncbn.enable_multi_worker(timeout=timeout)


def _prepare_jax(rank: int, workers: int) -> None:
    import jax
    import ray

    if workers == 1 or jax.distributed.is_initialized():
        return
    address = None
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    address = _ray_train().collective.broadcast_from_rank_zero(address)
    keras.distribution.initialize(address, workers, rank)


class ReportCheckpoint(keras.callbacks.BackupAndRestore):
    """Reports each epoch to Ray Train, with a checkpoint that training goes on from.

    Every worker reports the logs of the epoch as its metrics, and `epoch`, how many are finished.
    The checkpoint is of the first worker: what `keras.callbacks.BackupAndRestore` saves, weights,
    moving statistics, optimizer, the number of the epoch, and with `enable_multi_worker` the
    states of random numbers. Where Ray has a checkpoint when `fit` begins, as after a failure
    (`FailureConfig`) or in a run of the same name and `storage_path`, training goes on behind it:
    on TensorFlow to the bits of a training that was never interrupted.

    Args:
        every: epochs from one checkpoint to the next; the last epoch has one in any case. Metrics
            are reported in each.

    Raises:
        InputError: `every` is not a positive integer; in `fit`, the model is not built.
        NotSynchronizableError: in `fit`, this is no worker of Ray Train.

    References:
        Ray Train, `ray.train.report` and `ray.train.get_checkpoint`; Keras 3, `BackupAndRestore`.
    """

    def __init__(self, *, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(
                "ReportCheckpoint requires `every`, a positive number of epochs. "
                f"Received: {every!r}. Leave it out for a checkpoint in each epoch."
            )
        self._temporary = tempfile.TemporaryDirectory(
            prefix="syncbn-ray-", ignore_cleanup_errors=True
        )
        super().__init__(str(Path(self._temporary.name) / "backup"))
        self._every = every

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Take what Ray has, and go on behind it."""
        _place()
        checkpoint = _ray_train().get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                shutil.copytree(folder, self.backup_dir, dirs_exist_ok=True)
        super().on_train_begin(logs)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save, on the first worker, and report, on all of them."""
        due = (epoch + 1) % self._every == 0 or epoch + 1 == self.params["epochs"]
        if due:
            super().on_epoch_end(epoch, logs)
        rank, _ = _place()
        train = _ray_train()
        checkpoint = None
        if due and rank == 0 and self._saved() == epoch + 1:
            checkpoint = train.Checkpoint.from_directory(self.backup_dir)
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        train.report({**metrics, "epoch": epoch + 1}, checkpoint=checkpoint)

    def _saved(self) -> int | None:
        """The epoch of the backup: another one's where a disk was full, which is only warned of."""
        path = Path(self.backup_dir) / "training_metadata.json"
        if not path.exists():
            return None
        return int(json.loads(path.read_text(encoding="utf-8"))["epoch"])
