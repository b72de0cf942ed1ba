"""Which kernel makes the passes over the inputs: the one place that chooses."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from syncbn._backends.tensorflow.compiled import compiled
from syncbn._backends.tensorflow.composed import composed
from syncbn._backends.tensorflow.fused import fused
from syncbn._backends.tensorflow.scaling import Kernel

__all__ = ["kernel_for"]

# Elements from which the compiled passes are the faster ones.
_LARGE = 2**16

# Examples to expect where their number is not known while the graph is made.
_LIKELY_EXAMPLES = 16


def kernel_for(inputs: Any, axis: int) -> Kernel:
    """The kernel for these inputs."""
    if inputs.dtype == tf.float64:
        return composed  # TensorFlow has no fused kernel for it
    return compiled if _is_large(inputs, axis) and _may_compile() else fused


def _is_large(inputs: Any, axis: int) -> bool:
    """Whether there are that many elements, as far as is known, of a shape that hardly varies.

    Only the number of examples may be unknown: each new shape is compiled anew.
    """
    shape = list(inputs.shape)
    if axis % len(shape) != 0 and shape[0] is None:
        shape[0] = _LIKELY_EXAMPLES
    return None not in shape and math.prod(shape) >= _LARGE


def _may_compile() -> bool:
    # On a GPU cuDNN's passes are at the speed of memory.
    return tf.test.is_built_with_xla() and not tf.config.list_logical_devices("GPU")
