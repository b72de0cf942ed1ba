"""What the replicas of a strategy see in training, kept on their devices until it is read.

The step is Keras's own, traced once more with layers that tell of the moments that they take
anyway. All that is added are a few operations on vectors of the size of the channels, however many
layers there are; nothing of it leads back into the step, and no collective is added to it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from syncbn._backends.interface import Reading
from syncbn._backends.tensorflow import collectives
from syncbn.errors import NotSynchronizableError
from syncbn.moments import Moments

__all__ = ["Watch"]

_PARTS = ("count", "mean", "m2")
# One number of a channel that stands for all of them, as the count of elements mostly does.
_SCALAR = 1


class _Told(NamedTuple):
    """What one call of a layer told, while its step was traced."""

    layer: int
    channels: int
    values: tuple[Any, Any, Any]  # count, mean, M2: scalars or vectors; the count may be a number
    as_variance: bool = False  # in place of M2


class _Layout(NamedTuple):
    """How the row of a traced step is made up."""

    calls: tuple[int, ...]
    channels: tuple[int, ...]  # of each call
    variances: tuple[bool, ...]  # whether it told a variance in place of M2
    constants: tuple[tuple[int, float], ...]  # calls whose count is known, and the count
    pieces: tuple[tuple[int, int, int], ...]  # call, part, size: in the order of the row


class Watch:
    """Keeps what the layers of a model tell, on the replicas of its strategy.

    Args:
        model: compiled and built.
        layers: those that are watched.
        interval: of the steps that are read; the first is.
        switch: makes a block in which the layers tell this watch.
        told: called with each reading, on every worker alike.

    Raises:
        NotSynchronizableError: a strategy whose replicas do not train in step.
    """

    # Whether Keras's own layer, as it is by default, normalizes by the global batch.
    plain_is_global = False

    def __init__(
        self,
        model: Any,
        layers: Sequence[Any],
        interval: int,
        switch: Callable[[Watch], Callable[[], Any]],
        told: Callable[[Reading], None],
    ) -> None:
        self.strategy = model.distribute_strategy
        with self.strategy.scope():
            _check(self.strategy)
            self._dtype = collectives.moments_dtype()
        self.replicas = self.strategy.num_replicas_in_sync
        self.writes = _is_chief(self.strategy)
        self.step = 0
        self._model, self._layers, self._interval, self._told = model, layers, interval, told
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}
        self._telling = switch(self)
        self._layouts: list[_Layout] = []
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._slots = 4 * len(layers) + 16
        # Keras's own synchronized layer tells of its own part only where it is asked to.
        self._asks = [layer for layer in layers if _is_keras_synchronized(layer)]
        with self.strategy.scope():
            # Not empty: several workers are given the value of the first, and TensorFlow ends the
            # process that sends none.
            self._row = _of_replica(np.full(1, -1.0), self._dtype, [None])
            self._first = _of_replica(np.zeros(self._slots), tf.int32)
            self._count = _of_replica(np.zeros(()), tf.int64)
            self._asked = tf.Variable(False, trainable=False)
        self._own_rows = tf.function(self._rows, autograph=False)
        self._plain: Any = None
        self._monitored: Any = None

    def attach(self) -> None:
        """Have the model train by the step that tells."""
        now = self._model.train_function
        # Of a fit that has failed, or of another monitor, it is left there.
        plain = getattr(now, "syncbn_plain", now)
        if self._monitored is None or plain is not self._plain:
            self._plain = plain
            self._monitored = functools.partial(self._run, self._made())
            self._monitored.syncbn_plain = plain
        self._model.train_function = self._monitored

    def is_attached(self) -> bool:
        """Whether the model trains by it."""
        return self._model.train_function is self._monitored

    def detach(self) -> None:
        """The model's own step again."""
        if self.is_attached():
            self._model.train_function = self._plain

    def _made(self) -> Callable[[Any], Any]:
        """What Keras makes of the step, whoever made what of it."""
        model, own = self._model, vars(self._model)
        before = own.get("train_step")
        own["train_step"] = functools.partial(self._train_step, model.train_step)
        try:
            model.make_train_function(force=True)
            return model.train_function  # type: ignore[no-any-return]
        finally:
            own.pop("train_step")
            if before is not None:
                own["train_step"] = before
            model.train_function = self._plain

    def _run(self, traced: Callable[[Any], Any], iterator: Any) -> Any:
        steps = int(self._model.steps_per_execution)
        # Steps are read where one of 1, 1 + interval, 1 + 2 · interval, ... is among them.
        due = -self.step % self._interval < steps
        with self._asking() if due and self._asks else contextlib.nullcontext():
            outputs = traced(iterator)
        self.step += steps
        if due:
            self.read()
        return outputs

    @contextlib.contextmanager
    def _asking(self) -> Any:
        with self.strategy.scope():
            self._asked.assign(True)
        try:
            yield
        finally:
            with self.strategy.scope():
                self._asked.assign(False)

    def _train_step(self, train_step: Callable[..., Any], *data: Any) -> Any:
        self._of_thread.told, self._of_thread.graph = [], _graph()
        with self._telling():
            outputs = train_step(*data)
        self._keep(self._of_thread.told)
        self._of_thread.told = self._of_thread.graph = None
        return outputs

    def saw_moments(self, layer: Any, moments: Moments) -> None:
        """The moments of a replica's part, by a SyncBatchNormalization."""
        self._tell(layer, *moments)

    def saw_inputs(
        self, layer: Any, inputs: Any, axis: int, weights: Any, normalizing: Any
    ) -> None:
        """What Keras's BatchNormalization normalizes, and by what."""
        if normalizing is None or not self._is_told():
            return
        mean, variance = normalizing
        if not _is_keras_synchronized(layer) or (self.replicas == 1):
            # What can be left to who reads is not multiplied here, in every step.
            self._tell(layer, _count(inputs, axis, weights), mean, variance, as_variance=True)
            return

        def local() -> tuple[Any, Any, Any]:
            own = _count(inputs, axis, weights)
            return (_vector(own, mean), *_moments(inputs, axis, weights))

        def of_all() -> tuple[Any, Any, Any]:
            return (-tf.ones_like(mean), tf.identity(mean), tf.identity(variance))

        self._tell(layer, *tf.cond(self._asked, local, of_all))

    def _is_told(self) -> bool:
        """Whether this is the graph of the step, and not one of a loop or a function within it."""
        return getattr(self._of_thread, "told", None) is not None and (
            self._of_thread.graph is _graph()
        )

    def _tell(self, layer: Any, *values: Any, as_variance: bool = False) -> None:
        if self._is_told():
            (channels,) = layer.moving_mean.shape
            count, mean, m2 = values
            told = _Told(self._numbers[id(layer)], channels, (count, mean, m2), as_variance)
            self._of_thread.told.append(told)

    def _keep(self, told: list[_Told]) -> None:
        """Put what the calls told into this replica's variables."""
        step = self._count.assign_add(1)
        if not told:
            return
        pieces = [
            (call, part, value)
            for part in range(len(_PARTS))
            for call, one in enumerate(told)
            if tf.is_tensor(value := one.values[part])
        ]
        scalars = [piece for piece in pieces if not piece[2].shape.rank]
        vectors = [piece for piece in pieces if piece[2].shape.rank]
        rows = []
        for ranked, join in ((scalars, tf.stack), (vectors, functools.partial(tf.concat, axis=0))):
            for dtype in sorted({value.dtype for _, _, value in ranked}, key=repr):
                same = [piece for piece in ranked if piece[2].dtype == dtype]
                rows.append((tf.cast(join([value for _, _, value in same]), self._dtype), same))
        order = [
            (call, part, value.shape[0] if value.shape.rank else _SCALAR)
            for _, same in rows
            for call, part, value in same
        ]
        layout = _Layout(
            tuple(one.layer for one in told),
            tuple(one.channels for one in told),
            tuple(one.as_variance for one in told),
            tuple(
                (call, float(one.values[0]))
                for call, one in enumerate(told)
                if not tf.is_tensor(one.values[0])
            ),
            tuple(order),
        )
        with self._lock:
            if layout not in self._layouts:
                self._layouts.append(layout)
            number = self._layouts.index(layout)
        row = tf.concat([row for row, _ in rows], axis=0)
        self._row.assign(tf.concat([tf.constant([number], self._dtype), row], axis=0))
        calls = np.repeat([call for call, _, _ in order], [size for _, _, size in order])
        slots = np.minimum(calls, self._slots - 1).astype(np.int32)

        def note() -> Any:
            bad = tf.math.unsorted_segment_max(
                tf.cast(~tf.math.is_finite(row), tf.int32), slots, self._slots
            )
            first = tf.convert_to_tensor(self._first)
            self._first.assign(tf.where((first == 0) & (bad > 0), tf.cast(step, tf.int32), first))
            return tf.zeros((), tf.int32)

        # In most steps there is no more to do.
        all_finite = tf.reduce_all(tf.math.is_finite(row))
        tf.cond(all_finite, lambda: tf.zeros((), tf.int32), note)

    def read(self) -> None:
        """Tell what the last step saw, on all replicas; every worker comes here alike."""
        with self.strategy.scope():
            rows = self._own_rows()
        self._told(self._reading(rows.numpy()))

    def _rows(self) -> Any:
        """A row for each replica of all workers."""
        alone = self.replicas == 1
        several_workers = not alone and self.replicas > len(self.strategy.extended.worker_devices)

        def of_replica() -> Any:
            moving = [
                tf.cast(tf.concat([getattr(layer, name).value for layer in self._layers], 0), dtype)
                for name in ("moving_mean", "moving_variance")
            ]
            row = tf.concat(
                [
                    tf.cast(tf.convert_to_tensor(self._count), dtype)[None],
                    *moving,
                    tf.cast(tf.convert_to_tensor(self._first), dtype),
                    tf.convert_to_tensor(self._row),
                ],
                axis=0,
            )
            return collectives.rows_of_replicas(row, self.replicas) if several_workers else row

        dtype = self._dtype
        results = self.strategy.experimental_local_results(self.strategy.run(of_replica))
        return results[0] if several_workers else tf.stack(results)

    def _reading(self, rows: Any) -> Reading:
        moving = sum(layer.moving_mean.shape[0] for layer in self._layers)
        ends = np.cumsum([1, moving, moving, self._slots])
        step, mean, variance, first, row = np.split(rows, ends, axis=1)
        self.step = int(step[0, 0])
        if row[0, 0] < 0:
            nothing = np.zeros((self.replicas, 0))
            return Reading(self.step, (), nothing, nothing, nothing, mean, variance, nothing)
        layout = self._layouts[int(row[0, 0])]
        parts: list[list[Any]] = [[None] * len(layout.calls) for _ in _PARTS]
        for call, count in layout.constants:
            parts[0][call] = np.full((self.replicas, layout.channels[call]), count)
        begin = 1
        for call, part, size in layout.pieces:
            piece = row[:, begin : begin + size]
            wanted = (self.replicas, layout.channels[call])
            parts[part][call] = np.broadcast_to(piece, wanted) if size == _SCALAR else piece
            begin += size
        for call, as_variance in enumerate(layout.variances):
            if as_variance:
                parts[2][call] = parts[2][call] * parts[0][call]
        slots = np.minimum(np.arange(len(layout.calls)), self._slots - 1)
        counts, means, m2 = (np.concatenate(part, axis=1) for part in parts)
        return Reading(
            self.step,
            layout.calls,
            counts,
            means,
            m2,
            mean,
            variance,
            first[:, slots].astype(np.int64),
        )


def _check(strategy: Any) -> None:
    if isinstance(strategy, collectives.WITHOUT_MIRRORED_VARIABLES):
        raise NotSynchronizableError(
            "SyncMonitor requires replicas that train in step, each with its own copy of the "
            "variables, as under MirroredStrategy or MultiWorkerMirroredStrategy. Received: "
            f"{type(strategy).__name__}. Train under one of those, or without the monitor."
        )


def _is_chief(strategy: Any) -> bool:
    return bool(strategy.extended.should_checkpoint)


def _is_keras_synchronized(layer: Any) -> bool:
    return bool(getattr(layer, "synchronized", False)) and not hasattr(layer, "_scheme")


def _of_replica(value: Any, dtype: Any, shape: Any = None) -> Any:
    """A variable that each replica writes and reads by itself."""
    return tf.Variable(
        tf.constant(value, dtype),
        trainable=False,
        shape=shape,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


def _graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _count(inputs: Any, axis: int, weights: Any) -> Any:
    """Elements of a channel: a number where it is known, else a scalar or a vector."""
    axis %= inputs.shape.rank
    if weights is not None:
        others = [other for other in range(inputs.shape.rank) if other != axis]
        return tf.reduce_sum(tf.broadcast_to(weights, tf.shape(inputs)), others)
    sizes = [size for other, size in enumerate(inputs.shape) if other != axis]
    if None not in sizes:
        return float(np.prod(sizes))
    return tf.cast(tf.size(inputs, tf.int64) // inputs.shape[axis], tf.float32)


def _moments(inputs: Any, axis: int, weights: Any) -> tuple[Any, Any]:
    """Mean and M2 of a replica's part, in two passes."""
    axis %= inputs.shape.rank
    others = [other for other in range(inputs.shape.rank) if other != axis]
    weights = tf.ones_like(inputs) if weights is None else tf.cast(weights, inputs.dtype)
    weights = tf.broadcast_to(weights, tf.shape(inputs))
    values = tf.where(weights > 0, inputs, tf.zeros_like(inputs))
    count = tf.maximum(tf.reduce_sum(weights, others, keepdims=True), 1e-30)
    mean = tf.reduce_sum(weights * values, others, keepdims=True) / count
    m2 = tf.reduce_sum(weights * tf.square(values - mean), others)
    return tf.reshape(mean, (-1,)), m2


def _vector(count: Any, like: Any) -> Any:
    return tf.zeros_like(like) + tf.cast(count, like.dtype)
