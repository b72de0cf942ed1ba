"""What masks, an activation inside and groups cost: forward and backward of one layer, interleaved.

Masks against Keras's masked layer, which does not synchronize; the activation inside against the
same layer with the activation behind it; groups against one group of all.

    python benchmarks/features.py --output benchmarks/results/features.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# Before TensorFlow: it sets the environment.
from layer import in_training, interleaved, make_step, show

import keras  # isort: skip
import numpy as np
import tensorflow as tf

import syncbn
from machine import options, write
from syncbn._backends.tensorflow.replicas import mirrored_strategy

SHAPES = ((16, 56, 56, 64), (64, 50, 128))
REPLICAS = 4

Variant = tuple[keras.layers.Layer, Callable[[keras.layers.Layer, Any], Any]]


def with_relu_behind(layer: keras.layers.Layer, x: Any) -> Any:
    """The layer, and an activation of its own."""
    return tf.nn.relu(layer(x, training=True))


def masked(mask: np.ndarray) -> Callable[[keras.layers.Layer, Any], Any]:
    """The layer with the mask on every replica."""
    return lambda layer, x: layer(x, training=True, mask=tf.constant(mask))


def comparisons(shape: tuple[int, ...]) -> dict[str, dict[str, Variant]]:
    """By name: variants by name, the first of which is the one to compare with."""
    ours = syncbn.SyncBatchNormalization
    with_mask = masked(np.random.default_rng(0).random(shape[:-1]) > 0.3)
    return {
        "mask": {
            "keras_masked_local": (keras.layers.BatchNormalization(), with_mask),
            "syncbn_masked": (ours(), with_mask),
            "syncbn_without_mask": (ours(), in_training),
        },
        "activation": {
            "relu_behind": (ours(), with_relu_behind),
            "relu_inside": (ours(activation="relu"), in_training),
        },
        "groups": {
            "one_group": (ours(), in_training),
            "groups_of_two": (ours(group_size=2), in_training),
            "virtual_batches_of_4": (ours(virtual_batch_size=4), in_training),
            "renorm": (ours(renorm=True), in_training),
            "nan_check": (ours(nan_check=True), in_training),
        },
    }


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of every comparison at this shape."""
    strategy = mirrored_strategy(REPLICAS)
    results = {}
    with strategy.scope():
        variants_by_name = comparisons(shape)
    for name, variants in variants_by_name.items():
        steps = {
            variant: make_step(strategy, layer, shape, call)
            for variant, (layer, call) in variants.items()
        }
        results[name] = interleaved(steps, rounds, next(iter(variants)))
    return results


def main() -> int:
    """Measure every shape, print a table, write the JSON."""
    arguments = options(__doc__, rounds=30).parse_args()
    results = []
    for shape in SHAPES:
        figures = measure(shape, arguments.rounds)
        results.append({"shape_per_replica": shape, "comparisons": figures})
        print(f"{list(shape)} × {REPLICAS} replicas")
        for comparison in figures.values():
            show(comparison, next(iter(comparison)))
    write(
        arguments.output,
        what="forward and backward of one layer, float32",
        replicas=REPLICAS,
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
