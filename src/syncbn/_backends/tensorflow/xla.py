"""Functions of tensors that XLA compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

__all__ = ["is_available", "run"]


def is_available() -> bool:
    """Whether this TensorFlow compiles for where the layers run: CPUs.

    On a GPU cuDNN's passes run at the speed of memory, a TPU has no float64, and nothing here has
    been measured on either.
    """
    others = any(tf.config.list_logical_devices(kind) for kind in ("GPU", "TPU"))
    return tf.test.is_built_with_xla() and not others


def run(function: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
    """`function(*arguments, **static)`, compiled where that is possible.

    A call costs 4 µs, as much as ten small operations. Each new shape is compiled once on each
    device: 30 to 50 ms. No gradient is recorded: callers have one of their own around it, and what
    a tape might ask for would have to be computed and kept.

    Args:
        function: of tensors, without variables and other effects; one of a module, not a closure,
            of which each would be traced anew.
        *arguments: tensors of known rank.
        **static: what is not a tensor, and can be a key.
    """
    if not is_available():
        return function(*arguments, **static)
    tensors = [tf.convert_to_tensor(argument) for argument in arguments]
    compiled = _traced(function, tuple(map(_spec, tensors)), tuple(static.items()))
    with record.stop_recording():
        return compiled(*tensors)


def _spec(tensor: Any) -> tf.TensorSpec:
    """Of a vector with the size that is known of it; of rows of any number."""
    shape = tensor.shape if tensor.shape.rank < 2 else [None] * tensor.shape.rank
    return tf.TensorSpec(shape, tensor.dtype)


@functools.cache
def _traced(
    function: Callable[..., Any], signature: tuple[Any, ...], static: tuple[tuple[str, Any], ...]
) -> Any:
    """One for any number of rows: XLA compiles it for each that it meets."""
    return tf.function(
        functools.partial(function, **dict(static)),
        input_signature=signature,
        autograph=False,
        jit_compile=True,
    )
