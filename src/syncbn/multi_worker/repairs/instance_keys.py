"""Collectives of every step have numbers that come again, so that memory does not grow.

TensorFlow keeps a record of more than a kilobyte of every collective by its number, for ever, and
gives each call of a step new numbers: fifty synchronized layers leave 100 KB a step.

Here a collective gets a number of a ring, which comes again after `RING` others of its kind.
A record can be used again for the same shape alone, and all workers must choose alike: so only
tensors whose shape no batch decides take part, as payloads of layers, gradients of variables,
numbers of logs. Whoever sums them says so by the name scope `SAME_SHAPE`. TensorFlow orders the
collectives of a device one after another, so that a number never comes again while it is in use.

Within one process alone: on workers, where it saves as much, two workers waited for each other in
two of three runs of the whole suite, for a reason that is not known yet.

The records are the process's, while TensorFlow counts anew for each strategy: the second one met
those of the first, and failed where its shapes were others. Here all strategies count on.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from tensorflow.python.distribute.cross_device_utils import (
    CollectiveKeys,
    CollectiveReplicaLauncher,
)
from tensorflow.python.framework import ops

from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import SAME_SHAPE

__all__ = ["is_needed", "patches"]

RING = 64  # numbers of each kind of collective
FIRST = 1 << 24  # TensorFlow's own count upwards from 100
MOST_KINDS = (1 << 30) // RING


def is_needed() -> bool:
    """Whether every call of a function numbers its collectives anew."""
    return source_probe(
        "tensorflow.python.distribute.cross_device_utils."
        "CollectiveReplicaLauncher._next_instance_key",
        broken="return graph.capture_call_time_value( self._next_instance_key,",
    )


def patches() -> list[Patch]:
    """Where a collective gets its number, and the sum of the gradients."""
    return [
        Patch(CollectiveKeys, "get_instance_key", _counting_on),
        Patch(CollectiveReplicaLauncher, "all_reduce", _with_kind),
        Patch(CollectiveReplicaLauncher, "_next_instance_key", _numbering),
        Patch(TFOptimizer, "_all_reduce_sum_gradients", _of_variables),
    ]


class _Rings:
    """The numbers of one group of devices, for one of its devices.

    All devices of the group come by the same kinds in the same order, as they come by all
    collectives.
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, int] = {}
        self._used: Counter[Hashable] = Counter()
        self._lock = threading.Lock()

    def next(self, kind: Hashable) -> int:
        """The next number of a kind's ring."""
        with self._lock:
            ring = self._kinds.setdefault(kind, len(self._kinds)) % MOST_KINDS
            place = self._used[kind] % RING
            self._used[kind] += 1
        return FIRST + ring * RING + place


def _with_kind(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_reduce(launcher: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        with _kind(launcher, input_tensor):
            return original(launcher, input_tensor, *args, **kwargs)

    return all_reduce


@contextlib.contextmanager
def _kind(launcher: Any, tensor: Any) -> Iterator[None]:
    """While the launcher numbers this tensor's collective, it knows its dtype and shape."""
    scopes = tf.get_current_name_scope().split("/")
    same = any(scope.startswith(SAME_SHAPE) for scope in scopes)
    # A device of a worker says of which job it is; the strategy is not at hand everywhere.
    same = same and ("/job:" not in launcher._device or "/job:localhost" in launcher._device)
    if same and tf.is_tensor(tensor) and tensor.shape.is_fully_defined():
        launcher._syncbn_kind = (tensor.dtype.name, tuple(tensor.shape))
    try:
        yield
    finally:
        launcher._syncbn_kind = None


def _numbering(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _next_instance_key(launcher: Any) -> Any:
        kind = getattr(launcher, "_syncbn_kind", None)
        if kind is None or not launcher._use_unique_instance_key():
            return original(launcher)
        return _number(launcher, kind)

    return _next_instance_key


def _number(launcher: Any, kind: Hashable) -> Any:
    """Now in eager mode; in a function when it is called, wherever that is, as TensorFlow does."""
    graph = ops.get_default_graph()
    while getattr(graph, "is_control_flow_graph", False):
        graph = graph.outer_graph
    if not tf.executing_eagerly() and graph.building_function:
        with graph.as_default():
            return graph.capture_call_time_value(
                lambda: _number(launcher, kind), tf.TensorSpec([], tf.int32)
            )
    with tf.device("CPU:0"):
        return tf.convert_to_tensor(_rings(launcher).next(kind), dtype=tf.int32)


def _rings(launcher: Any) -> _Rings:
    """Of the process, as TensorFlow's records are: launchers and strategies are made anew."""
    with _lock:
        return _rings_of.setdefault((launcher._group_key, launcher._device), _Rings())


def _counting_on(original: Callable[..., int]) -> Callable[..., int]:
    """A number of which no strategy of this process has had a collective."""

    @functools.wraps(original)
    def get_instance_key(keys: Any, group_key: int, device: str) -> int:
        number = original(keys, group_key, device)
        with _lock:
            number = max(number, _counts.get((group_key, device), 0))
            # In TensorFlow's own table, too, for what follows when the repairs are undone.
            keys._instance_key_table[group_key][device] = number + 1
            _counts[group_key, device] = number + 1
        return number

    return get_instance_key


_lock = threading.Lock()
_rings_of: dict[tuple[int, str], _Rings] = {}
_counts: dict[tuple[int, str], int] = {}


def _of_variables(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _all_reduce_sum_gradients(optimizer: Any, grads_and_vars: Any) -> Any:
        pairs = list(grads_and_vars)
        for gradient, variable in pairs:
            if isinstance(gradient, tf.Tensor):
                # Not left to inference, which may know more on one worker than on another.
                gradient.set_shape(variable.shape)
        with tf.name_scope(SAME_SHAPE):
            return original(optimizer, pairs)

    return _all_reduce_sum_gradients
