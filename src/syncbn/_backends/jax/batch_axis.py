"""The batch axis of a device mesh: its slots and the processes that fill them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import dtypes

from syncbn.places import Slots, slots_of_processes

__all__ = ["dtype_name", "slots_of"]


def slots_of(mesh: Any, axis: str, processes: int) -> Slots:
    """The slots of a `jax.sharding.Mesh` along its batch axis."""
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    rows = devices.reshape(devices.shape[0], -1)
    return slots_of_processes([{device.process_index for device in row} for row in rows], processes)


def dtype_name(dtype: Any) -> str:
    """The name of the dtype that JAX makes of this one, as float32 of float64 without x64."""
    return str(np.dtype(dtypes.canonicalize_dtype(dtype)).name)
