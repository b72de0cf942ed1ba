"""Collectives of every step have numbers that come again, so that memory does not grow.

TensorFlow keeps a record of more than a kilobyte of every collective by its number, for ever, and
gives each call of a step new numbers: fifty synchronized layers leave 100 KB a step. On workers
each new number costs a question to worker 0 besides, a fourth of the collective's time.

Here a collective gets a number of a ring, which comes again after `RING` others of its kind; when
that is safe says `rings`. A record can be used again for the same shape alone, and all workers must
choose alike: so only tensors whose shape no batch decides take part, as payloads of layers,
gradients of variables, numbers of logs. Whoever sums them says so by the name scope `SAME_SHAPE`.
On workers the calls of Keras's operations take part alone: there the workers meet at the beginning,
and an error is seen. A training loop of your own has TensorFlow's numbers there.

The records are the process's, while TensorFlow counts anew for each strategy: the second one met
those of the first, and failed where its shapes were others. Here all strategies count on.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from tensorflow.python.distribute import input_lib
from tensorflow.python.distribute.cross_device_utils import (
    CollectiveKeys,
    CollectiveReplicaLauncher,
)
from tensorflow.python.framework import ops

from syncbn.multi_worker import small_sums
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import SAME_SHAPE
from syncbn.multi_worker.rings import numbers

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether every call of a function numbers its collectives anew."""
    return source_probe(
        "tensorflow.python.distribute.cross_device_utils."
        "CollectiveReplicaLauncher._next_instance_key",
        broken="return graph.capture_call_time_value( self._next_instance_key,",
    )


def patches() -> list[Patch]:
    """Where a collective gets its number, and sums of Keras's and TensorFlow's own."""
    return [
        Patch(input_lib, "_calculate_replicas_with_values", _of_one_number),
        Patch(CollectiveKeys, "get_instance_key", _counting_on),
        Patch(CollectiveReplicaLauncher, "all_reduce", _with_kind),
        Patch(CollectiveReplicaLauncher, "_next_instance_key", _numbering),
        Patch(TFOptimizer, "_all_reduce_sum_gradients", _of_variables),
    ]


def _with_kind(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_reduce(launcher: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        with _kind(launcher, input_tensor):
            if launcher._syncbn_kind and small_sums.is_small(launcher, input_tensor):
                return small_sums.all_reduce(launcher, input_tensor, *args, **kwargs)
            return original(launcher, input_tensor, *args, **kwargs)

    return all_reduce


@contextlib.contextmanager
def _kind(launcher: Any, tensor: Any) -> Iterator[None]:
    """While the launcher numbers this tensor's collective, it knows its dtype and shape."""
    scopes = tf.get_current_name_scope().split("/")
    same = any(scope.startswith(SAME_SHAPE) for scope in scopes)
    same = same and tf.is_tensor(tensor) and tensor.shape.is_fully_defined()
    launcher._syncbn_kind = (tensor.dtype.name, tuple(tensor.shape)) if same else None
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
    group, device = launcher._group_key, launcher._device
    if small_sums.is_on_workers(launcher) and not numbers.are_agreed:
        number = launcher._collective_keys.get_instance_key(group, device)
    else:
        number = numbers.rings(group, device).next(kind)
    with tf.device("CPU:0"):
        return tf.convert_to_tensor(number, dtype=tf.int32)


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
_counts: dict[tuple[int, str], int] = {}


def _of_one_number(original: Callable[..., Any]) -> Callable[..., Any]:
    """How many replicas have data for the next step."""

    @functools.wraps(original)
    def _calculate_replicas_with_values(*args: Any, **kwargs: Any) -> Any:
        with tf.name_scope(SAME_SHAPE):
            return original(*args, **kwargs)

    return _calculate_replicas_with_values


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
