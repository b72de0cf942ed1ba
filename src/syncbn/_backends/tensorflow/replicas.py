"""Devices and strategies for jobs that syncbn runs itself, such as `syncbn train`."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import tensorflow as tf

from syncbn.errors import InputError

__all__ = [
    "make_virtual_devices",
    "mirrored_strategy",
    "one_device_strategy",
    "prepare",
    "strategy_over",
    "workers_strategy",
]

# Groups of collectives are numbered upwards from a strategy's base; TensorFlow's own tests keep
# strategies of one process apart by bases this far from each other.
_KEY_BASES = itertools.count(100_000, 100_000)


def prepare(devices: int, precision: str) -> None:
    """Make the devices of a job; must come before anything else uses TensorFlow.

    Raises:
        InputError: it is too late.
    """
    del precision  # there is every dtype from the start
    make_virtual_devices(devices)


def strategy_over(replicas: int, by_processes: bool) -> Any:
    """What a loop is given: a strategy over all workers, or over devices of this process."""
    if by_processes:
        return workers_strategy()
    return one_device_strategy() if replicas == 1 else mirrored_strategy(replicas)


def make_virtual_devices(count: int) -> list[str]:
    """Names of `count` devices: accelerators if there are enough, else virtual CPU devices.

    Raises:
        InputError: TensorFlow has started with fewer devices; they are fixed from then on.
    """
    for kind in ("GPU", "CPU"):
        physical = tf.config.list_physical_devices(kind)
        if len(physical) >= count:
            return [f"{kind}:{i}" for i in range(count)]
    try:
        cpu = tf.config.list_physical_devices("CPU")[0]
        configured = tf.config.get_logical_device_configuration(cpu) or []
        if len(configured) < count:
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
    except RuntimeError as error:
        found = len(tf.config.list_logical_devices("CPU"))
        raise InputError(
            f"Training on {count} replicas requires as many devices. Received: a process whose "
            f"TensorFlow has started with {found} CPU device(s). Ask for the replicas before "
            "anything else uses TensorFlow."
        ) from error
    return [f"CPU:{i}" for i in range(count)]


@functools.cache
def mirrored_strategy(replicas: int) -> Any:
    """A MirroredStrategy over that many devices, one for the life of the process.

    TensorFlow numbers the collectives of every MirroredStrategy from the same start, so that a
    second one in the process meets the first one's and fails ("Shape mismatch in the collective
    instance"). Hence one strategy a replica count, each with a range of numbers of its own.

    Raises:
        InputError: there are not enough devices, and it is too late to make more.
    """
    devices = make_virtual_devices(replicas)
    numbered = type(
        "MirroredStrategy",
        (tf.distribute.MirroredStrategy,),
        {"_collective_key_base": next(_KEY_BASES)},
    )
    return numbered(devices)


def one_device_strategy() -> Any:
    """TensorFlow's default strategy: one replica, no distribution."""
    return tf.distribute.get_strategy()


@functools.cache
def workers_strategy() -> Any:
    """The MultiWorkerMirroredStrategy of TF_CONFIG, over what this process sees; one a process."""
    return tf.distribute.MultiWorkerMirroredStrategy()
