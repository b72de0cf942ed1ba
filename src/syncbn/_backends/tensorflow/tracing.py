"""Traces that TensorFlow neither takes for others nor makes of others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.python.ops import control_flow_ops

__all__ = ["traced_apart"]


class _Apart(control_flow_ops.XLAControlFlowContext):
    """A context by which TensorFlow tells traces apart, as it does for a TPU's, and nothing else.

    Of all that a trace is known by, besides arguments, it is the only thing that one can choose:
    devices count for strategies alone, and a save context stands for much else.
    """

    def IsXLAContext(self) -> bool:  # noqa: N802 - TensorFlow's
        return False

    def RequiresUniqueFunctionRetracing(self) -> bool:  # noqa: N802 - TensorFlow's
        return True


# TensorFlow knows a context by its address, which must not become that of another.
_MADE: list[_Apart] = []


@contextlib.contextmanager
def traced_apart() -> Iterator[None]:
    """A block in which what users compile by `tf.function` is traced anew, and for it alone.

    TensorFlow calls what it has traced before, whatever has happened to the objects in it since.
    Without a graph such functions run as plain Python.
    """
    if tf.executing_eagerly():
        before = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(before)
        return
    context = _Apart()
    _MADE.append(context)
    context.Enter()
    try:
        yield
    finally:
        context.Exit()
