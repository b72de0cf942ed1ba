"""A training step of ResNet-50 on two replicas of one machine: its layers Keras's or ours.

keras.applications.ResNet50, 64 px, batch 8 a replica, SGD; the same weights and the same data in
every variant, as `fit` runs the step. The variants take turns in one process.

    python benchmarks/resnet.py --output benchmarks/results/resnet.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# Before TensorFlow: it sets the environment.
from layer import FusedLocal, interleaved, show

import keras  # isort: skip
import numpy as np
import tensorflow as tf

import syncbn
from machine import options, write
from syncbn._backends.tensorflow.replicas import mirrored_strategy

REPLICAS = 2
PIXELS = 64
BATCH = 8  # on each replica
CLASSES = 1000
BASELINE = "keras_sync"
# Ours and Keras's are the same function of the same batch: the first losses may differ by rounding.
LOSS_TOLERANCE = 1e-3

Convert = Callable[[dict[str, Any]], keras.layers.Layer]

VARIANTS: dict[str, Convert] = {
    "syncbn": syncbn.SyncBatchNormalization.from_config,
    BASELINE: lambda config: keras.layers.BatchNormalization(**{**config, "synchronized": True}),
    "keras_local": keras.layers.BatchNormalization.from_config,
    # The bound: what a step takes beside synchronizing and composing.
    "fused_local": FusedLocal.from_config,
}


def converted(model: keras.Model, convert: Convert) -> keras.Model:
    """A copy of the model, weights too, each BatchNormalization made anew from its configuration.

    To be called in the scope of the strategy that is to hold the weights.
    """

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.layers.BatchNormalization):
            return convert(layer.get_config())
        return layer.__class__.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=clone)
    copy.set_weights(model.get_weights())
    return copy


def examples(model: keras.Model, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels; brighter ones on the later replica, so that statistics differ."""
    rng = np.random.default_rng(0)
    offset = np.linspace(0, 1, count).reshape(-1, 1, 1, 1)
    images = rng.normal(size=(count, *model.input_shape[1:])) + offset
    return images.astype(np.float32), rng.integers(model.output_shape[-1], size=count)


class Step:
    """A step of training, as `fit` runs it.

    Attributes:
        first_seconds: what the first step took, tracing included.
        first_loss: the loss of the first step.
        peak: bytes that TensorFlow's allocator lent at most in a later step, above the start; 0
            where it does not count.
    """

    def __init__(self, model: keras.Model, convert: Convert, strategy: Any) -> None:
        with strategy.scope():
            self._model = converted(model, convert)
            self._model.compile(
                keras.optimizers.SGD(1e-3),
                keras.losses.SparseCategoricalCrossentropy(),
                jit_compile=False,
            )
        batch = BATCH * strategy.num_replicas_in_sync
        data = tf.data.Dataset.from_tensor_slices(examples(model, batch)).repeat().batch(batch)
        self._iterator = iter(strategy.experimental_distribute_dataset(data))
        self._model.make_train_function()
        start = time.perf_counter()
        self()
        self.first_seconds = time.perf_counter() - start
        self.first_loss = self.loss
        self.peak = self._peak()

    def __call__(self) -> None:
        """Run a step, and bring the loss to Python, averaged with those of the steps before."""
        self.loss = float(self._model.train_function(self._iterator)["loss"])

    def _peak(self) -> int:
        device = tf.config.list_logical_devices("CPU")[0].name
        tf.config.experimental.reset_memory_stats(device)
        start = tf.config.experimental.get_memory_info(device)["current"]
        self()
        return max(0, int(tf.config.experimental.get_memory_info(device)["peak"] - start))


def check_losses(losses: Mapping[str, float]) -> None:
    """Refuse figures of variants that did not do the same work.

    Raises:
        RuntimeError: the first losses of ours and Keras's synchronized layer differ.
    """
    difference = abs(losses["syncbn"] - losses[BASELINE])
    if not difference <= LOSS_TOLERANCE:
        raise RuntimeError(
            f"Equal work requires first losses within {LOSS_TOLERANCE}. Received: {losses}. "
            "Find what the variants do differently before measuring them."
        )


def measure(
    model: keras.Model, strategy: tf.distribute.Strategy, rounds: int
) -> dict[str, dict[str, float]]:
    """Figures of each variant of the model, from interleaved rounds."""
    steps = {name: Step(model, convert, strategy) for name, convert in VARIANTS.items()}
    check_losses({name: step.first_loss for name, step in steps.items()})
    figures = interleaved(steps, rounds, BASELINE)
    for name, step in steps.items():
        figures[name]["first_step_seconds"] = round(step.first_seconds, 2)
        figures[name]["first_loss"] = round(step.first_loss, 6)
        figures[name]["peak_megabytes_of_allocator"] = round(step.peak / 1e6, 1)
    return figures


def main() -> int:
    """Measure, print a table, write the JSON."""
    arguments = options(__doc__, rounds=12).parse_args()
    strategy = mirrored_strategy(REPLICAS)
    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(
        weights=None, input_shape=(PIXELS, PIXELS, 3), classes=CLASSES
    )
    figures = measure(model, strategy, arguments.rounds)
    print(f"ResNet-50, {PIXELS} px, batch {BATCH} × {REPLICAS} replicas")
    show(figures, BASELINE)
    for name, found in figures.items():
        print(f"  {name:21} first step {found['first_step_seconds']:.1f} s")
    write(
        arguments.output,
        what="a training step of ResNet-50, MirroredStrategy, float32",
        replicas=REPLICAS,
        batch_per_replica=BATCH,
        pixels=PIXELS,
        layers_converted=sum(
            isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers
        ),
        rounds=arguments.rounds,
        variants=figures,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
