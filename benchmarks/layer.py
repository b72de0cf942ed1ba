"""One batch normalization layer, forward and backward, on R replicas: ours against Keras's.

The variants run in turn in one process, so that a change of the machine's speed meets all of them;
a figure is the median of the ratios of one round, with the quartiles as its spread. Beside them in
each round is a copy, `x + dy`, for the share of the copy bandwidth that each variant reaches.

    python benchmarks/layer.py --output benchmarks/results/layer.json
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

from machine import options, write
from syncbn._backends.tensorflow.replicas import mirrored_strategy
from syncbn.bench.layer import measure_layer, show_bandwidth
from syncbn.bench.step import in_training, make_step
from syncbn.bench.timing import interleaved, show
from syncbn.bench.variants import KERAS_SYNC as BASELINE
from syncbn.bench.variants import OURS, fused_local, legacy_variants, variants

__all__ = [
    "BASELINE",
    "SHAPES",
    "VARIANTS",
    "FusedLocal",
    "in_training",
    "interleaved",
    "make_step",
    "show",
    "without_samples",
]

SHAPES = ((16, 56, 56, 64), (16, 14, 14, 256), (64, 128), (1024, 512))
VARIANTS = variants()
FusedLocal = fused_local()


def measure(shape: tuple[int, ...], replicas: int, rounds: int) -> dict[str, Any]:
    """Figures of each variant against all but ours, and of the copy bandwidth."""
    makers = {**VARIANTS, **legacy_variants()}
    baselines = [BASELINE, *(name for name in makers if name not in (OURS, BASELINE))]
    strategy = mirrored_strategy(replicas)
    return without_samples(measure_layer(strategy, makers, shape, rounds, baselines))


def without_samples(result: dict[str, Any]) -> dict[str, Any]:
    """The figures alone: a results page needs no more."""
    return {name: value for name, value in result.items() if name != "seconds"}


def main() -> int:
    """Measure every shape, print a table, write the JSON."""
    parser = options(__doc__, rounds=40)
    parser.add_argument("--replicas", type=int, default=2)
    arguments = parser.parse_args()
    results = []
    for shape in SHAPES:
        figures = measure(shape, arguments.replicas, arguments.rounds)
        results.append({"shape_per_replica": shape, **figures})
        print(f"{list(shape)} × {arguments.replicas} replicas")
        show(figures["variants"], BASELINE)
        print(show_bandwidth(figures))
    write(
        arguments.output,
        what="forward and backward of one layer, float32",
        replicas=arguments.replicas,
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
