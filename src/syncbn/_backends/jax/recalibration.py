"""The steps of a recalibration on JAX: on one device, or under `keras.distribution`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from keras.src.backend.jax.trainer import JAXEpochIterator

from syncbn._backends.jax import collectives

__all__ = ["moments_dtype", "scope", "vectors"]


def scope(model: Any) -> Any:
    """The context in which variables of the model are made and assigned: any."""
    del model
    return contextlib.nullcontext()


def moments_dtype(model: Any) -> str:
    """Of the moments of a step: float64 where JAX has it, `jax_enable_x64`, else float32."""
    del model
    return str(np.dtype(collectives.moments_dtype()).name)


def vectors(model: Any, data: Any, gathered: Sequence[Any], steps: int | None) -> Iterator[Any]:
    """What was gathered in each step, all variables in one vector; the same on every device.

    Args:
        model: called in inference on each global batch.
        data: `x` and `batch_size`, for Keras's adapters.
        gathered: variables, taken as 0 before each step.
        steps: at most so many; None for all.
    """
    epoch = JAXEpochIterator(x=data.x, batch_size=data.batch_size, shuffle=False)
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    values = [variable.value for variable in variables]
    step = _step(model, variables, gathered)
    epoch.data_adapter.on_epoch_begin()
    try:
        batches = iter(epoch._get_iterator())
        taken = 0
        while taken != steps:
            batch = next(batches, None)
            if batch is None:
                return
            x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
            yield np.asarray(step(values, x))
            taken += 1
    finally:
        epoch.data_adapter.on_epoch_end()


def _step(model: Any, variables: Sequence[Any], gathered: Sequence[Any]) -> Any:
    def step(values: Any, x: Any) -> Any:
        state = list(zip(variables, values, strict=True))
        state += [(variable, jnp.zeros(variable.shape, variable.dtype)) for variable in gathered]
        with keras.StatelessScope(state_mapping=state) as stateless:
            model(x, training=False)
        return jnp.concatenate([stateless.get_current_value(v).reshape(-1) for v in gathered])

    if not _can_be_compiled(model, gathered):
        return step
    active = keras.distribution.distribution()
    if active is None:
        return jax.jit(step)
    everywhere = NamedSharding(active.device_mesh.backend_mesh, PartitionSpec())
    return jax.jit(step, out_shardings=everywhere)


def _can_be_compiled(model: Any, gathered: Sequence[Any]) -> bool:
    """As `compile(jit_compile=…)` has it, or else as its layers have, but for those that gather."""
    asked = getattr(model, "_jit_compile", None)
    if asked is not None:
        return bool(asked)
    ours = {id(variable) for variable in gathered}
    return all(
        layer.supports_jit or id(getattr(layer, "gathered", None)) in ours
        for layer in model._flatten_layers()
    )
