"""Whether a thread is within a call of TensorFlow that waits for other workers.

The frame of the call names the function that runs, and whether that has collectives can be read
from its definition. So a custom training loop, which tells nobody what it does, can be watched too.
"""

from __future__ import annotations

import functools
from types import FrameType
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context as tf_context

__all__ = ["is_in_collective", "line_in"]

# Where frames are not the user's own.
_LIBRARIES = ("site-packages", "dist-packages", "lib/python", "<frozen", "syncbn/multi_worker")


def is_in_collective(frame: FrameType | None) -> bool:
    """Whether this is, or is within, the call of an operation or function with collectives."""
    # Keras's and TensorFlow's wrappers are above; the call into C++ has no frame of its own.
    if frame is None:
        return False
    file = frame.f_code.co_filename.replace("\\", "/")
    if file.endswith("/ops/gen_collective_ops.py"):
        return True
    if frame.f_code.co_name != "quick_execute" or not file.endswith("/eager/execute.py"):
        return False
    name = frame.f_locals.get("op_name")
    if isinstance(name, bytes):
        name = name.decode()
    return isinstance(name, str) and _has_collectives(name)


@functools.lru_cache(maxsize=1024)
def _has_collectives(name: str) -> bool:
    """Of an operation, or of a function with all that it calls."""
    seen: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        if current.startswith("Collective"):
            return True
        if current in seen or not tf_context.context().has_function(current):
            continue
        seen.add(current)
        for node in _nodes(current):
            pending.append(node.op)
            for attribute in node.attr.values():
                pending += [attribute.func.name, *(func.name for func in attribute.list.func)]
    return False


def _nodes(name: str) -> Any:
    try:
        return tf_context.context().get_function_def(name).node_def
    except tf.errors.OpError:  # it was deleted a moment ago
        return []


def line_in(frame: FrameType | None) -> str | None:
    """The user's own line that a stack is in, as `line 12 of train.py`."""
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if not any(part in file for part in _LIBRARIES):
            return f"line {frame.f_lineno} of {file.rpartition('/')[2]}"
        frame = frame.f_back
    return None
