"""Devices and distributions for jobs that syncbn runs itself, such as `syncbn train`."""

from __future__ import annotations

import functools
from typing import Any

import jax
from keras import distribution

from syncbn.errors import InputError

__all__ = ["make_virtual_devices", "prepare", "strategy_over"]


def prepare(devices: int, precision: str) -> None:
    """Make the devices of a job, and float64 where it is asked for, which JAX leaves out.

    Raises:
        InputError: it is too late: JAX has started.
    """
    if precision == "float64":
        jax.config.update("jax_enable_x64", True)
    make_virtual_devices(devices)


def make_virtual_devices(count: int) -> list[Any]:
    """So many devices: accelerators if there are enough, else virtual CPU devices.

    Raises:
        InputError: JAX has started with fewer devices; they are fixed from then on.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
        refused: RuntimeError | None = None
    except RuntimeError as error:
        refused = error  # of no matter where there are enough
    for platform in (None, "cpu"):
        devices: list[Any] = jax.devices(platform)
        if len(devices) >= count:
            return devices[:count]
    raise InputError(
        f"Training on {count} replicas requires as many devices. Received: a process whose JAX has "
        f"started with {len(devices)} CPU device(s). Ask for the replicas before anything else "
        "uses JAX, and leave --xla_force_host_platform_device_count out of XLA_FLAGS."
    ) from refused


@functools.cache
def strategy_over(replicas: int, by_processes: bool) -> Any:
    """What a loop is given: a DataParallel over devices of this process; None for one device."""
    del by_processes  # one process has all of the devices
    if replicas == 1:
        return None
    names = [f"{device.platform}:{device.id}" for device in make_virtual_devices(replicas)]
    return distribution.DataParallel(devices=names)
