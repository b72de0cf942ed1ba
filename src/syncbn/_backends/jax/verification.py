"""How `verify` sees the numbers of a step on JAX's devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

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
HAS_PROCESSES = False
# What syncbn has for the training by `fit`.
REPAIR = "syncbn.distribute_dataset(x, y, batch_size=…)"


def is_numeric(value: Any) -> bool:
    """Whether it is an array of numbers, known or traced; keys of random numbers are none."""
    if not isinstance(value, jax.Array):
        return False
    return bool(jnp.issubdtype(value.dtype, jnp.number) or value.dtype == jnp.bool_)


def dense(gradient: Any) -> Any:
    """A gradient as an array; of an embedding it may be sparse."""
    return gradient.todense() if hasattr(gradient, "todense") else jnp.asarray(gradient)


def observe(tensors: list[Any], keep: Callable[[int, list[Any]], None]) -> None:
    """Have `keep` called with the numbers, when the step computes them; one process has all."""

    def note(*numbers: Any) -> None:
        keep(0, [_plain(number) for number in numbers])

    jax.debug.callback(note, *tensors)


def _plain(number: Any) -> Any:
    """NumPy has no bfloat16 of its own; float32 holds each of its values."""
    array = np.asarray(number)
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


@contextlib.contextmanager
def on_replicas(strategy: Any) -> Iterator[None]:
    """Where the model is made and trained."""
    if strategy is None:
        yield
        return
    with strategy.scope():
        yield


def repaired(model: Any) -> Any:
    """Nothing is to be done to a model: what is to be mended is what it is fed."""
    return model


def fed(batches: Any, strategy: Any, repair: bool) -> dict[str, Any]:
    """Arguments of `fit`; of a distribution that is repaired, batches of any size."""
    arrays = {"x": batches.x, "y": batches.y, "sample_weight": batches.sample_weight}
    if strategy is None or not repair:
        return {**arrays, "batch_size": batches.size}
    from syncbn.ragged import distribute_dataset

    return {"x": distribute_dataset(**arrays, batch_size=batches.size)}


def logs(model: Any, of_step: dict[str, Any]) -> dict[str, Any]:
    """What Keras reports of the step."""
    del model
    return of_step


def wait(model: Any) -> None:
    """Until all numbers of the step are known, and the variables have theirs."""
    jax.effects_barrier()
    model.jax_state_sync()


def values(variables: list[Any], strategy: Any) -> dict[int, list[Any]]:
    """The numbers of all variables on each device that has them whole."""
    count = 1 if strategy is None else len(devices(strategy))
    found: dict[int, list[Any]] = {replica: [] for replica in range(count)}
    for variable in variables:
        value = variable.value
        shards = value.addressable_shards
        whole = len(shards) == count and all(one.data.shape == value.shape for one in shards)
        copies = [one.data for one in shards] if whole else [value] * count
        for replica, copy in enumerate(copies):
            found[replica].append(np.array(copy))
    return found


def has_short_products() -> bool:
    """Whether products of float32 matrices keep fewer bits than float32 has, as on accelerators."""
    precision = jax.config.jax_default_matmul_precision
    return jax.default_backend() != "cpu" and precision not in {"float32", "highest"}


def is_repaired() -> bool:
    """Nothing of Keras's is replaced."""
    return False


def sharing(strategy: Any) -> tuple[int, bool, bool, bool]:
    """Replicas; that one process computes for all of them, on the whole batch."""
    return len(devices(strategy)), True, False, False


def sharing_of_processes(replicas: int, repaired: bool) -> tuple[int, bool, bool, bool]:
    """Not to be had: see `verify`."""
    raise NotImplementedError(replicas, repaired)


def devices(strategy: Any) -> list[str]:
    """Their names."""
    if strategy is None:
        return [keras.distribution.list_devices()[0]]
    return [str(name) for name in np.ravel(strategy.device_mesh.devices)]
