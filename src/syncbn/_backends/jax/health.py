"""Checks by values, which only code that is not compiled can make."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from syncbn._backends.interface import Batch, Scheme
from syncbn._backends.jax.values import is_concrete
from syncbn.errors import UnsupportedFeatureError
from syncbn.moments import Moments

__all__ = ["check", "refuse_where_compiled"]


def check(layer: str | None, union: Moments, batch: Batch) -> None:
    """Make sure that the statistics of the batch and the layer's variables are finite.

    Why not inside `jit`: XLA has no assertions. What there is either changes what the function
    returns, so that Keras's train step would have to know of it (`jax.experimental.checkify`), or
    raises from a host callback: on one process alone, while the others wait in their next
    collective, some steps later, with the buffers of the variables already given away.

    Args:
        layer: its name, or None for no check.
        union: moments of the whole batch.
        batch: with the layer's variables.

    Raises:
        FloatingPointError: with the layer and the origin, as JAX's own `jax_debug_nans`.
    """
    if layer is None:
        return
    origins = {"its input": [*union], "the state of the layer": [*batch.state.values()]}
    found = [
        origin
        for origin, values in origins.items()
        if not all(bool(jnp.all(jnp.isfinite(value))) for value in values)
    ]
    if found:
        raise FloatingPointError(
            f"Layer {layer!r} with nan_check=True requires finite numbers. Received: NaN or "
            f"infinity in {' and '.join(found)}. This call has updated nothing. If it is the "
            "input, or overflows when it is squared, look at the data and the layers before; if "
            "it is the state, restore a checkpoint."
        )


def refuse_where_compiled(scheme: Scheme, inputs: Any) -> None:
    """Make sure that the inputs have values now, where an argument of the layer needs them.

    Raises:
        UnsupportedFeatureError: JAX traces or maps the code.
    """
    if scheme.checked_layer is not None:
        layer, argument = scheme.checked_layer, "nan_check=True"
        otherwise = "look for the NaN with jax_debug_nans"
    elif scheme.kept_output is not None:
        layer, argument, otherwise = scheme.kept_output.layer, "save='output'", "take save='input'"
    else:
        return
    if not is_concrete(inputs):
        raise UnsupportedFeatureError(
            f"Layer {layer!r} with {argument} requires values to look at, and XLA, which compiles "
            "what JAX traces, leaves assertions out. Received: a call inside jax.jit or a map over "
            "devices. Compile the model with jit_compile=False, on one device or under "
            f"keras.distribution, or {otherwise}."
        )
