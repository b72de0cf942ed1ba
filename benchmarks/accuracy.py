"""How right the global variance and the outputs are at large means, ours against Keras's.

Two replicas of 512 × 4 and 300 × 4 float32 values of standard deviation 1 whose means lie one
standard deviation apart; largest error relative to float64 NumPy over the whole batch.

    python benchmarks/accuracy.py --output benchmarks/results/accuracy.json
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import syncbn
from machine import options, write
from syncbn._backends.tensorflow.replicas import mirrored_strategy

OFFSETS = (0.0, 1e1, 1e2, 1e3, 1e4, 1e5)
SIZES = (512, 300)


def errors(layer_class: Any, offset: float, seed: int, **arguments: Any) -> tuple[float, float]:
    """Relative error of the variance, and error of the outputs in standard deviations."""
    strategy = mirrored_strategy(2)
    rng = np.random.default_rng(seed)
    parts = [
        rng.normal(offset + replica, 1, (size, 4)).astype(np.float32)
        for replica, size in enumerate(SIZES)
    ]
    with strategy.scope():
        layer = layer_class(momentum=0.0, epsilon=1e-6, **arguments)
        layer.build((None, 4))
    x = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )
    run = tf.function(
        lambda x: strategy.run(layer, args=(x,), kwargs={"training": True}), autograph=False
    )
    outputs = np.concatenate([y.numpy() for y in strategy.experimental_local_results(run(x))])
    whole = np.concatenate(parts).astype(np.float64)
    expected = (whole - whole.mean(axis=0)) / np.sqrt(whole.var(axis=0) + 1e-6)
    variance = layer.moving_variance.numpy()
    return (
        float(np.abs(variance / whole.var(axis=0) - 1).max()),
        float(np.abs(outputs - expected).max()),
    )


def largest(layer_class: Any, offset: float, rounds: int, **arguments: Any) -> tuple[float, float]:
    """Of so many rounds, each of other values."""
    found = [errors(layer_class, offset, seed, **arguments) for seed in range(rounds)]
    return max(variance for variance, _ in found), max(outputs for _, outputs in found)


def main() -> int:
    """Measure at every offset, print a table, write the JSON."""
    # A round is other values; there is nothing to time.
    arguments = options(__doc__, rounds=1).parse_args()
    rounds = arguments.rounds
    rows = []
    print("  mean   variance: Keras     ours   outputs: Keras     ours")
    for offset in OFFSETS:
        theirs = largest(keras.layers.BatchNormalization, offset, rounds, synchronized=True)
        ours = largest(syncbn.SyncBatchNormalization, offset, rounds)
        rows.append({"mean": offset, "keras_sync": theirs, "syncbn": ours})
        print(
            f"{offset:6.0e}          {theirs[0]:9.1e}{ours[0]:9.1e}"
            f"         {theirs[1]:9.1e}{ours[1]:9.1e}"
        )
    write(
        arguments.output,
        what="largest error of [variance, relative; outputs, in standard deviations]",
        rounds=rounds,
        results=rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
