"""Which kernel makes the passes over the inputs: the one place that chooses."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from syncbn._backends.tensorflow import xla
from syncbn._backends.tensorflow.compiled import compiled
from syncbn._backends.tensorflow.composed import composed
from syncbn._backends.tensorflow.fused import fused
from syncbn._backends.tensorflow.scaling import Kernel

__all__ = ["kernel_for"]

# Elements from which the compiled passes are the faster ones.
_LARGE = 2**15

# Examples to expect where their number is not known while the graph is made: of vectors, and of
# anything with positions.
_LIKELY_VECTORS = 128
_LIKELY_EXAMPLES = 16


def kernel_for(inputs: Any, axis: int) -> Kernel:
    """The kernel for these inputs."""
    if inputs.dtype == tf.float64:
        return composed  # TensorFlow has no fused kernel for it
    elements = _likely_elements(inputs, axis)
    if not xla.is_available() or elements is None:
        return fused
    return compiled if elements >= _LARGE else composed


def _likely_elements(inputs: Any, axis: int) -> int | None:
    """How many elements there are, or may be; None for a shape that varies.

    Only the number of examples may be unknown: each new shape is compiled anew.
    """
    shape = list(inputs.shape)
    if axis % len(shape) != 0 and shape[0] is None:
        shape[0] = _LIKELY_VECTORS if len(shape) == 2 else _LIKELY_EXAMPLES
    return None if None in shape else math.prod(shape)
