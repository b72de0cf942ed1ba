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

# Elements from which the compiled passes are the fastest: benchmarks/results/kernels.json. Below,
# starting a compiled function costs as much as the elementary operations that it replaces; the
# fused kernels cost 0.2 ms a call, whatever the size.
_LARGE = 2**15

# Examples to expect where their number is not known while the graph is made: of vectors, and of
# anything with positions.
_LIKELY_VECTORS = 128
_LIKELY_EXAMPLES = 16


def kernel_for(inputs: Any, axis: int) -> Kernel:
    """The kernel for these inputs, by device kind and shape.

    On a CPU the compiled one reads each tensor once, where others read it twice or write outputs
    that nobody wants. On a GPU it is cuDNN's, which runs at the speed of memory; XLA's has not been
    measured there. Compiling takes a fifth of a second for a new shape, so it is for shapes that
    hardly vary.
    """
    if inputs.dtype == tf.float64:
        return composed  # TensorFlow has no fused kernel for it
    elements = _likely_elements(inputs, axis)
    if not xla.is_available() or elements is None:
        return fused
    return compiled if elements >= _LARGE else composed


def _likely_elements(inputs: Any, axis: int) -> int | None:
    """How many elements there are, or may be; None for a shape that varies.

    Only the number of examples may be unknown: in training it is one number, and another at the
    end of the data.
    """
    shape = list(inputs.shape)
    if axis % len(shape) != 0 and shape[0] is None:
        shape[0] = _LIKELY_VECTORS if len(shape) == 2 else _LIKELY_EXAMPLES
    return None if None in shape else math.prod(shape)
