"""One layer on one device, without a strategy: ours against Keras's plain layer.

python benchmarks/one_device.py --output benchmarks/results/one_device.json
"""

from __future__ import annotations

import sys

# Before TensorFlow: it sets the environment.
from layer import SHAPES, VARIANTS, show, without_samples
from machine import options, write
from syncbn._backends.tensorflow.replicas import one_device_strategy
from syncbn.bench.layer import measure_layer, show_bandwidth
from syncbn.bench.variants import FUSED_LOCAL, KERAS_LOCAL, OURS

# Without a strategy Keras's synchronized layer is its plain one.
MAKERS = {name: VARIANTS[name] for name in (OURS, KERAS_LOCAL, FUSED_LOCAL)}
BASELINES = (KERAS_LOCAL, FUSED_LOCAL)


def main() -> int:
    """Measure every shape, print a table, write the JSON."""
    arguments = options(__doc__, rounds=40).parse_args()
    strategy = one_device_strategy()
    results = []
    for shape in SHAPES:
        figures = measure_layer(strategy, MAKERS, shape, arguments.rounds, BASELINES)
        results.append({"shape": shape, **without_samples(figures)})
        print(f"{list(shape)}")
        show(figures["variants"], KERAS_LOCAL)
        print(show_bandwidth(figures))
    write(
        arguments.output,
        what="forward and backward of one layer on one device, float32",
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
