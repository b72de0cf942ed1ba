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

# Elements of an example that is an image, of which batches have one size, and another at the end of
# the data. Of smaller ones, as regions of 14 × 14 × 256, every batch may have another number.
_IMAGE = 2**16


def kernel_for(inputs: Any, axis: int) -> Kernel:
    """The kernel for these inputs, by device kind, dtype and shape.

    On a CPU the compiled one reads each tensor once, where others read it twice or write outputs
    that nobody wants. On a GPU it is cuDNN's, which runs at the speed of memory; XLA's has not been
    measured there. Compiling takes a fifth of a second for each new shape on each device, so it is
    for graphs, and for shapes that hardly vary. What depends on this is local to a replica: the
    collectives are the same for every kernel.
    """
    if inputs.dtype == tf.float64:
        return composed  # TensorFlow has no fused kernel for it
    first, *others = inputs.shape
    if (
        not xla.is_available()
        or None in others
        or (first is None and axis % (len(others) + 1) == 0)
    ):
        return fused
    if first is None:
        large = math.prod(others) >= _IMAGE
        return compiled if large else fused
    if math.prod(inputs.shape) < _LARGE:
        return composed
    return fused if tf.executing_eagerly() else compiled
