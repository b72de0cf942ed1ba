"""How `verify` sees the numbers of a step on TensorFlow's replicas."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.losses import loss as keras_loss

__all__ = [
    "HAS_LOCAL_REPLICAS",
    "HAS_PROCESSES",
    "REPAIR",
    "dense",
    "devices",
    "fed",
    "has_short_products",
    "is_numeric",
    "is_repaired",
    "logs",
    "observe",
    "on_replicas",
    "repaired",
    "sharing",
    "sharing_of_processes",
    "values",
    "wait",
]

# One process may have several replicas.
HAS_LOCAL_REPLICAS = True
# Replicas may be processes.
HAS_PROCESSES = True
# What syncbn has for the training by `fit`.
REPAIR = "syncbn.enable_multi_worker()"


def is_numeric(value: Any) -> bool:
    """Whether it is a tensor of numbers; strings, ragged and sparse tensors are none."""
    return (
        tf.is_tensor(value)
        and isinstance(value, tf.Tensor)
        and value.dtype.is_numpy_compatible
        and (value.dtype.is_floating or value.dtype.is_integer or value.dtype.is_bool)
    )


def dense(gradient: Any) -> Any:
    """A gradient as a tensor; of an embedding it is slices."""
    return tf.convert_to_tensor(gradient)


def observe(tensors: list[Any], keep: Callable[[int, list[Any]], None]) -> None:
    """Have `keep` called with the replica and the numbers, when the step computes them."""
    # NumPy has no bfloat16 of its own; float32 holds each of its values.
    tensors = [
        tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor for tensor in tensors
    ]
    context = tf.distribute.get_replica_context()
    replica = 0 if context is None else context.replica_id_in_sync_group

    def note(number: Any, *numbers: Any) -> None:
        keep(int(number), list(numbers))

    if tf.executing_eagerly():
        note(tf.get_static_value(replica), *(tensor.numpy() for tensor in tensors))
        return
    # Stateful, so that no graph leaves it out, and they run in the order in which they are traced.
    tf.numpy_function(note, [replica, *tensors], [])


@contextlib.contextmanager
def on_replicas(strategy: Any) -> Iterator[None]:
    """Where the model is made and trained."""
    with strategy.scope():
        yield


def repaired(model: Any) -> Any:
    """Nothing is to be done to a model: `enable_multi_worker()` repairs Keras."""
    return model


def fed(batches: Any, strategy: Any, repair: bool) -> dict[str, Any]:
    """Arguments of `fit`: every process has the whole batches, and TensorFlow shares them out."""
    del strategy, repair
    return {
        "x": batches.x,
        "y": batches.y,
        "sample_weight": batches.sample_weight,
        "batch_size": batches.size,
    }


def logs(model: Any, of_step: dict[str, Any]) -> dict[str, Any]:
    """What Keras reports of the step."""
    del model
    return of_step


def wait(model: Any) -> None:
    """Until all numbers of the step are known."""
    del model  # they are


def values(variables: list[Any], strategy: Any) -> dict[int, list[Any]]:
    """The numbers of all variables on each replica of this process."""
    first = _first_replica(strategy)
    found: dict[int, list[Any]] = {}
    for variable in variables:
        for number, copy in enumerate(strategy.experimental_local_results(variable.value)):
            found.setdefault(first + number, []).append(np.array(copy))
    return found


def _first_replica(strategy: Any) -> int:
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.cluster_spec():
        return 0
    workers = len(resolver.cluster_spec().as_dict().get("worker", ())) or 1
    of_each = int(strategy.num_replicas_in_sync) // workers
    return int(resolver.task_id) * of_each


def has_short_products() -> bool:
    """Whether products of float32 matrices keep 10 bits, as on GPUs by default ("TF32")."""
    enabled = tf.config.experimental.tensor_float_32_execution_enabled()
    return bool(enabled and tf.config.list_physical_devices("GPU"))


def is_repaired() -> bool:
    """Whether `enable_multi_worker()` is in effect."""
    return bool(keras_loss.reduce_weighted_values.__module__.startswith("syncbn."))


def sharing(strategy: Any) -> tuple[int, bool, bool, bool]:
    """Replicas; whether one process computes for all; whether losses, and gradients, are shares.

    Of the batch's, which they add up to; a loss of the repaired trainer is a mean.
    """
    return int(strategy.num_replicas_in_sync), False, not is_repaired(), True


def sharing_of_processes(replicas: int, repaired: bool) -> tuple[int, bool, bool, bool]:
    """The same of workers, which each have one replica."""
    return replicas, False, not repaired, True


def devices(strategy: Any) -> list[str]:
    """Names of the devices of this process."""
    return [name.rpartition("device:")[2] for name in strategy.extended.worker_devices]
