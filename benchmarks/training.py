"""A step of fit on two replicas of one machine: repaired against Keras's own, interleaved.

Full batches, where both are right. Every step takes its batch from the dataset and brings the
loss to Python, as a progress bar does.

    python benchmarks/training.py --output benchmarks/results/training.json
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

# Before TensorFlow: it sets the environment.
from layer import interleaved, show

import keras  # isort: skip
import numpy as np
import tensorflow as tf

import syncbn
from machine import options, write
from syncbn._backends.tensorflow.replicas import mirrored_strategy

REPLICAS = 2
BATCH = 64
BASELINE = "keras"


def perceptron() -> keras.Model:
    """Small: what a step costs beside its arithmetic."""
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((32,)), layers.Dense(64, activation="relu"), layers.Dense(10)]
    )


def convnet() -> keras.Model:
    """As people train: convolutions, synchronized layers, dropout."""
    layers = [keras.Input((32, 32, 3))]
    for filters in (16, 32, 64):
        layers += [
            keras.layers.Conv2D(filters, 3, strides=2, use_bias=False),
            syncbn.SyncBatchNormalization(),
            keras.layers.ReLU(),
        ]
    layers += [
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(10),
    ]
    return keras.Sequential(layers)


MODELS: dict[str, tuple[Callable[[], keras.Model], dict[str, Any]]] = {
    "perceptron": (perceptron, {}),
    "perceptron, clipped": (perceptron, {"clipnorm": 1.0}),
    "convnet": (convnet, {}),
}


def make_step(make_model: Callable[[], keras.Model], repaired: bool, **of_adam: Any) -> Any:
    """One step of fit as the trainer runs it, traced with the repairs in effect or without."""
    strategy = mirrored_strategy(REPLICAS)
    scope = syncbn.enable_multi_worker() if repaired else contextlib.nullcontext()
    with scope:
        with strategy.scope():
            model = make_model()
            model.compile(
                keras.optimizers.Adam(1e-3, **of_adam),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
            )
        rng = np.random.default_rng(0)
        x = rng.normal(size=(BATCH * 4, *model.input_shape[1:])).astype(np.float32)
        y = rng.integers(10, size=BATCH * 4)
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).repeat()
        iterator = iter(strategy.experimental_distribute_dataset(dataset.batch(BATCH)))
        # It is traced here, and not again: what is in effect later does not matter.
        model.fit(x, y, batch_size=BATCH, verbose=0)
        model.train_function(iterator)

    def step() -> None:
        float(model.train_function(iterator)["loss"])

    return step


def main() -> int:
    """Measure every model, print a table, write the JSON."""
    arguments = options(__doc__, rounds=200).parse_args()
    results = []
    for name, (make_model, of_adam) in MODELS.items():
        steps = {
            BASELINE: make_step(make_model, repaired=False, **of_adam),
            "repaired": make_step(make_model, repaired=True, **of_adam),
        }
        figures = interleaved(steps, arguments.rounds, BASELINE)
        results.append({"model": name, "variants": figures})
        print(f"{name}, batch {BATCH} × {REPLICAS} replicas")
        show(figures, BASELINE)
    write(
        arguments.output,
        what="a step of fit, MirroredStrategy, float32",
        replicas=REPLICAS,
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
