"""SyncMonitor: what the replicas see in training, and whether synchronizing matters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from syncbn import _backends
from syncbn._backends.interface import Reading
from syncbn.errors import InputError, NotSynchronizableError
from syncbn.monitoring import statistics
from syncbn.monitoring.event_file import EventFile
from syncbn.monitoring.ledger import Ledger
from syncbn.monitoring.report import MonitorReport
from syncbn.monitoring.watched import NotWatched, Switch, Watched, find
from syncbn.monitoring.words import nan_in_words, spread_in_words

__all__ = ["SyncMonitor"]


class SyncMonitor(keras.callbacks.Callback):
    """Watches every batch normalization of a model while `fit` trains it on replicas.

    Says of each layer, SyncBatchNormalization and Keras's own alike, how far the statistics of the
    replicas are from those of the global batch, whether their moving statistics have parted, and
    which layer and replica first saw NaN or infinity. With means and biased variances of a replica
    r and of the union of all replicas' elements, each counted by its weight (a masked one is none),

        d_r = √(1/C · Σ_c (mean_rc − mean_c)² / (variance_c + epsilon))
        v_r = 1/C · Σ_c |log((variance_rc + epsilon) / (variance_c + epsilon))|
        s = max_c max(max_r m_rc − min_r m_rc, max_r σ_rc − min_r σ_rc) / min_r σ_rc

    over the C channels c, where m is `moving_mean` and `σ² = moving_variance + epsilon`. d is what
    normalizing by its own statistics would shift a replica's outputs by, in standard deviations, v
    what it would scale them by: what synchronizing prevents. s is to be 0.

    In `History.history`, once an epoch, for each layer and by its path: `sync/<layer>/…` with
    `mean_distance` (the largest d_r), `mean_distance_average` (over the replicas),
    `variance_distance` and `variance_distance_average` (v_r), `spread` (s) and `nan_step` (the
    first training step that showed NaN or infinity, 0 for none), as last read. In the logs that all
    callbacks get, the progress bar too: the largest of the layers as `sync/mean_distance`,
    `sync/variance_distance`, `sync/spread`, and the first `sync/nan_step`. TensorBoard has all of
    them, at each step that is read.

    Read are the first step, each `interval`-th after it, and on TensorFlow and torch the last of
    each epoch. Training gives the same numbers as without the monitor. NaN is found in the step it
    appears in, whatever the interval, and told at the next reading.

    On several workers or processes all of them use the callback alike: they get the same values,
    and the first one writes the files.

    Args:
        log_dir: a directory for TensorBoard, or None. Nothing is needed to write it.
        interval: steps from one reading to the next.
        on_spread: "warn" or "raise" where moving statistics differ between replicas.

    Raises:
        InputError: an argument that cannot be; in `fit`, a model without a layer to watch.
        NotSynchronizableError: in `fit`, replicas that do not train in step; by
            `on_spread="raise"`, moving statistics that have parted.

    References:
        d_r is the root mean square, over the channels, of the standardized difference of two means:
        Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988 (section 2.2).
    """

    # `on_train_batch_end` is left alone, or Keras would wait for the numbers of every step.

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        interval: int = 100,
        on_spread: str = "warn",
    ) -> None:
        super().__init__()
        _check(log_dir, interval, on_spread)
        self._log_dir = None if log_dir is None else Path(log_dir)
        self._interval, self._on_spread = interval, on_spread
        self._watch: Any = None
        self._watched_model: Any = None
        self._watched: Sequence[Watched] = ()
        self._left: Sequence[NotWatched] = ()
        self._ledger: Ledger | None = None
        self._file: EventFile | None = None
        self._epochs: list[tuple[int, int]] = []  # number, and steps before it
        self._warned_of_loss = False

    def report(self) -> MonitorReport:
        """What has been found so far, as data; `str()` of it is in words.

        Raises:
            InputError: nothing has been trained with this monitor.
        """
        if self._ledger is None:
            raise InputError(
                "SyncMonitor.report() requires a model that has been trained with it. Received: a "
                "monitor that no `fit` has begun with. Give it to model.fit(callbacks=[monitor])."
            )
        return self._ledger.report(self._watched_model.name, self._watch.step, self._left)

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002 - Keras's
        """Have the model train by a step that tells what its layers see."""
        watched, left = find(self.model)
        if not watched:
            raise InputError(
                "SyncMonitor requires a model with a batch normalization that is trainable. "
                f"Received: {self.model.name!r} with "
                f"{', '.join(f'{one.path}: {one.reason}' for one in left[:3]) or 'none at all'}. "
                "Leave the monitor out, or set `trainable = True` on layers that are to be watched."
            )
        layers = [one.layer for one in watched]
        if self._watched_model is not self.model or layers != [one.layer for one in self._watched]:
            backend = _backends.get(keras.backend.backend(), "monitoring")
            self._watch = backend.Watch(
                self.model,
                layers,
                self._interval,
                lambda watch: Switch(layers, watch),
                self._read,
            )
            self._watched_model, self._watched = self.model, watched
            self._ledger = Ledger(watched, self._watch.replicas, self._watch.plain_is_global)
            self._epochs = []
        self._left = left
        if self._log_dir is not None and self._watch.writes:
            self._file = EventFile(self._log_dir)
        self._watch.attach()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Note at which step the epoch begins."""
        self._epochs.append((epoch, self._watch.step))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Read once more, and hand over what is known to the history and to other callbacks."""
        del epoch
        assert self._ledger is not None
        if not self._watch.is_attached() and not self._warned_of_loss:
            self._warned_of_loss = True
            warnings.warn(
                "SyncMonitor requires the training step that it has put in. Received: another one, "
                "of a second SyncMonitor or of model.compile() during fit. Nothing is recorded "
                "from there on: use one monitor, and compile before fit.",
                stacklevel=2,
            )
        self._watch.read()
        of_layers, of_model = self._ledger.by_layer(), self._ledger.of_model()
        if logs is not None:
            logs.update(of_model)
        # Not in the logs: a progress bar would show, and a CSV file hold, six columns a layer.
        history = getattr(getattr(self.model, "history", None), "history", None)
        if history is not None:
            for name, value in of_layers.items():
                history.setdefault(name, []).append(value)

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Give the model its own step back."""
        self._watch.detach()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, reading: Reading) -> None:
        """What one step showed."""
        assert self._ledger is not None
        parted, faults = self._ledger.add(reading)
        if self._file is not None:
            self._file.write(reading.step, self._ledger.by_layer() | self._ledger.of_model())
        if faults:
            warnings.warn(self._nan_in_words(reading, faults), stacklevel=2)
        if parted:
            message = spread_in_words(parted, self._watch.replicas, reading.step)
            if self._on_spread == "raise":
                self.on_train_end()
                raise NotSynchronizableError(message)
            warnings.warn(message, stacklevel=2)

    def _nan_in_words(self, reading: Reading, faults: list[statistics.FirstFault]) -> str:
        paths = [one.path for one in self._watched]
        step = min(fault.step for fault in faults)
        begins = [(begin, epoch) for epoch, begin in self._epochs if begin < step]
        begin, epoch = max(begins, default=(0, 0))
        when = f"training step {step} (step {step - begin} of epoch {epoch + 1})"
        return nan_in_words(reading, faults, paths, when, self._watch.replicas)


def _check(log_dir: Any, interval: Any, on_spread: Any) -> None:
    if log_dir is not None and not isinstance(log_dir, (str, os.PathLike)):
        raise InputError(
            "SyncMonitor requires `log_dir` as a path, or None for no files. Received: "
            f"log_dir={log_dir!r}."
        )
    is_number = isinstance(interval, (int, np.integer)) and not isinstance(interval, bool)
    if not is_number or interval < 1:
        raise InputError(
            "SyncMonitor requires `interval` as a number of steps, at least 1. Received: "
            f"interval={interval!r}."
        )
    if on_spread not in ("warn", "raise"):
        raise InputError(
            f"SyncMonitor requires on_spread='warn' or 'raise'. Received: on_spread={on_spread!r}."
        )
