"""Several virtual CPU devices in a worker, as `syncbn launch --devices-per-worker` asks for.

TensorFlow gives a worker without accelerators one replica, however many CPU devices it has. With
them the training of many machines with several GPUs each can be tried on one without any.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

from syncbn.errors import InputError
from syncbn.multi_worker.repair import Patch

__all__ = ["VARIABLE", "make_virtual_devices", "patches", "replicas_on_all_devices"]

VARIABLE = "SYNCBN_DEVICES_PER_WORKER"


def patches() -> list[Patch]:
    """What gives every virtual device a replica; none where none was asked for.

    Raises:
        InputError: the variable is no number, or TensorFlow has started with fewer devices.
    """
    text = os.environ.get(VARIABLE)
    if text is None or tf.config.list_physical_devices("GPU"):
        return []
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise InputError(f"{VARIABLE} requires a number of devices. Received: {text!r}.")
    if int(text) == 1:
        return []
    make_virtual_devices(int(text))
    return [replicas_on_all_devices(int(text))]


def make_virtual_devices(count: int) -> None:
    """Split the CPU; before TensorFlow starts, as its devices are fixed from then on."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    if len(tf.config.get_logical_device_configuration(cpu) or []) == count:
        return
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError as error:
        raise InputError(
            f"{count} devices a worker require that TensorFlow has not started. Received: a "
            "program that used it before. Call syncbn.enable_multi_worker() first."
        ) from error


def replicas_on_all_devices(count: int) -> Patch:
    """A MultiWorkerMirroredStrategy made from now on has so many replicas a worker."""

    def replacement(_: Callable[..., Any]) -> Callable[..., Any]:
        def _initialize_local_devices(
            strategy: Any,  # noqa: ARG001 - TensorFlow's method
            cluster_resolver: Any,  # noqa: ARG001
            worker_device: str,
        ) -> tuple[tuple[str, ...], str]:
            return tuple(f"{worker_device}/device:CPU:{i}" for i in range(count)), "CPU"

        return _initialize_local_devices

    return Patch(CollectiveAllReduceExtended, "_initialize_local_devices", replacement)
