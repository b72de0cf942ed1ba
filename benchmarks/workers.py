"""A step of fit on two worker processes: twenty synchronized layers, ours against Keras's.

Both in Keras's repaired trainer, without which there is nothing to compare: fit fails on several
workers. The models take turns, step by step, in the same two processes on 127.0.0.1.

    python benchmarks/workers.py --output benchmarks/results/workers.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import options, write
from processes import add_options, measured_by, tf_config

WORKERS = 2
LAYERS = 20
SHAPE = (7, 7, 256)
BATCH = 8  # on each worker
BASELINE = "keras_sync"


def make_step(strategy: Any, make_layer: Callable[[], Any]) -> Callable[[], None]:
    """A step of fit of a model of nothing but such layers, relu between them."""
    import keras
    import numpy as np
    import tensorflow as tf

    with strategy.scope():
        layers = [keras.Input(SHAPE)]
        for _ in range(LAYERS):
            layers += [make_layer(), keras.layers.ReLU()]
        layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
        model = keras.Sequential(layers)
        model.compile(
            keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * BATCH * WORKERS, *SHAPE)).astype(np.float32)
    y = rng.integers(10, size=len(x))
    batches = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(BATCH * WORKERS)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    iterator = iter(strategy.experimental_distribute_dataset(batches.with_options(options)))
    model.fit(x, y, batch_size=BATCH * WORKERS, verbose=0)

    def step() -> None:
        float(model.train_function(iterator)["loss"])

    return step


def work(rounds: int, output: Path) -> None:
    """One worker: the same rounds as the other, and the chief keeps the figures."""
    # Before TensorFlow: it sets the environment.
    from layer import interleaved

    import keras  # isort: skip
    import tensorflow as tf

    import syncbn
    from syncbn.multi_worker.rings import numbers

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    syncbn.enable_multi_worker()
    variants: dict[str, Callable[[], Any]] = {
        "syncbn": syncbn.SyncBatchNormalization,
        BASELINE: lambda: keras.layers.BatchNormalization(synchronized=True),
        "keras_local": keras.layers.BatchNormalization,
    }
    steps = {name: make_step(strategy, make) for name, make in variants.items()}
    # As within fit, for which the workers have met: numbers of collectives come again there.
    with numbers.operation():
        figures = interleaved(steps, rounds, BASELINE)
    if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 0:
        output.write_text(json.dumps(figures), encoding="utf-8")
    # TensorFlow's servers would wait for each other at the end.
    os._exit(0)


def measure(rounds: int, timeout: float) -> dict[str, dict[str, float]]:
    """Start the workers and read the chief's figures."""
    arguments = ["--rounds", str(rounds)]
    figures: dict[str, dict[str, float]] = measured_by(
        __file__, WORKERS, arguments, timeout, tf_config(WORKERS)
    )
    return figures


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = options(__doc__, rounds=60)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.rounds, arguments.worker)
    figures = measure(arguments.rounds, arguments.timeout)
    from layer import show

    print(f"{LAYERS} layers of {[BATCH, *SHAPE]} × {WORKERS} workers")
    show(figures, BASELINE)
    write(
        arguments.output,
        what="a step of fit, MultiWorkerMirroredStrategy, float32",
        layers=LAYERS,
        shape_per_replica=[BATCH, *SHAPE],
        workers=WORKERS,
        rounds=arguments.rounds,
        variants=figures,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
