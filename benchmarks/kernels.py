"""The passes over one replica's part, by each kernel and size: what the layer's choice rests on.

    python benchmarks/kernels.py --output benchmarks/results/kernels.json

One step is what a layer does between its collectives: moments, normalization, sums of the gradient
and gradient, without a strategy. And for the compiled kernel: how many strips of rows are summed
side by side.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
import tensorflow as tf

from machine import options, write
from syncbn._backends.tensorflow import compiled, kernels, xla
from syncbn._backends.tensorflow.composed import composed
from syncbn._backends.tensorflow.fused import fused
from syncbn._backends.tensorflow.scaling import Correction, Kernel, Scaling
from syncbn._backends.tensorflow.views import View
from syncbn.bench.timing import interleaved, show

KERNELS: dict[str, Kernel] = {
    "composed": composed,
    "compiled": compiled.compiled,
    "fused": fused,
}
SHAPES = (
    (16, 128),
    (64, 128),
    (128, 128),
    (256, 128),
    (512, 128),
    (1024, 512),
    (8, 7, 7, 256),
    (16, 14, 14, 256),
    (16, 28, 28, 128),
    (16, 56, 56, 64),
)
STRIPS = (4, 8, 12, 16, 32)
STRIPS_SHAPE = (16, 56, 56, 64)
BASELINE = "fused"


def make_step(kernel: Kernel, shape: tuple[int, ...]) -> Callable[[], None]:
    """All four passes, compiled into one function of TensorFlow."""
    rng = np.random.default_rng(0)
    x, dy = (tf.constant(rng.normal(size=shape), tf.float32) for _ in range(2))
    view = View.of(x, -1, shape[-1])

    def passes(x: Any, dy: Any) -> Any:
        x, dy = view.of_tensor(x), view.of_tensor(dy)
        moments = kernel.moments(x, None, tf.float64)
        ones = tf.ones(shape[-1])
        scaling = Scaling.of(moments, ones, ones, 1e-3)
        y = kernel.apply(x, scaling)
        sums, left = kernel.sums(dy, x, None, scaling)
        packed, _ = sums.normalized(scaling)
        correction = Correction.of(packed, moments.count, scaling)
        return y, kernel.gradient(dy, x, None, scaling, correction, left)

    step = tf.function(passes, autograph=False)

    def run() -> None:
        for result in step(x, dy):
            result.device  # noqa: B018 - the function has run when its results are there

    return run


def strips_step(strips: int) -> Callable[[], None]:
    """The compiled kernel with so many strips."""
    usual = compiled._STRIPS
    compiled._STRIPS = strips
    xla._traced.cache_clear()
    try:
        step = make_step(compiled.compiled, STRIPS_SHAPE)
        step()
    finally:
        compiled._STRIPS = usual
        xla._traced.cache_clear()
    return step


def chosen(shape: tuple[int, ...]) -> str:
    """The kernel that the layer takes for this shape."""
    with tf.Graph().as_default():
        kernel = kernels.kernel_for(tf.TensorSpec(shape), -1)
    return next(name for name, one in KERNELS.items() if one is kernel)


def main() -> int:
    """Measure every shape and number of strips, print a table, write the JSON."""
    arguments = options(__doc__, rounds=40).parse_args()
    results = []
    for shape in SHAPES:
        steps = {name: make_step(kernel, shape) for name, kernel in KERNELS.items()}
        figures = interleaved(steps, arguments.rounds, BASELINE)
        results.append({"shape": shape, "chosen": chosen(shape), "variants": figures})
        print(f"{list(shape)}, for which the layer takes {chosen(shape)}")
        show(figures, BASELINE)
    by_strips = {str(strips): strips_step(strips) for strips in STRIPS}
    usual = str(compiled._STRIPS)
    figures = interleaved(by_strips, arguments.rounds, usual)
    print(f"{list(STRIPS_SHAPE)}, compiled, by strips")
    show(figures, usual)
    write(
        arguments.output,
        what="moments, normalization, sums and gradient of one replica, float32",
        rounds=arguments.rounds,
        results=results,
        strips={"shape": STRIPS_SHAPE, "usual": usual, "variants": figures},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
