"""What SyncMonitor costs: single steps with it and without in turn, and what a reading takes.

A residual network as people train, and one that does not favour it: many small layers on vectors,
where a step is little but the overhead of its operations. Every step tells what it sees; one of an
interval is read, with a file for TensorBoard. Steps in turn, for a machine's speed drifts by more
than what is to be seen.

    python benchmarks/monitor.py --output benchmarks/results/monitor.json
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before TensorFlow: it sets the environment.
from layer import interleaved, show

import keras  # isort: skip
import numpy as np
import tensorflow as tf

import syncbn
from machine import options, write
from syncbn._backends.tensorflow.replicas import mirrored_strategy
from syncbn.monitoring import SyncMonitor

INTERVAL = 100  # the default
NEVER = 10**9
BASELINE = "without"


def residual_network() -> keras.Model:
    """Nine blocks of two convolutions, 19 normalizations, as for CIFAR-10."""
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))

    def normalized(x: Any, filters: int, strides: int = 1) -> Any:
        x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        return syncbn.SyncBatchNormalization()(x)

    x = layers.ReLU()(normalized(inputs, 16))
    for filters in (16, 16, 16, 32, 32, 32, 64, 64, 64):
        strides = filters // x.shape[-1]
        shortcut = layers.Conv2D(filters, 1, strides)(x) if strides > 1 else x
        inner = layers.ReLU()(normalized(x, filters, strides))
        x = layers.ReLU()(layers.Add()([normalized(inner, filters), shortcut]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def many_small_layers(make_layer: Callable[[], Any]) -> keras.Model:
    """Forty normalizations of 16 channels."""
    layers: list[Any] = [keras.Input((16,))]
    for _ in range(40):
        layers += [keras.layers.Dense(16, use_bias=False), make_layer(), keras.layers.ReLU()]
    return keras.Sequential([*layers, keras.layers.Dense(10)])


MODELS: dict[str, tuple[Callable[[], keras.Model], int, int]] = {
    # model, batch on all replicas, replicas
    "residual network": (residual_network, 16, 2),
    "many small layers": (lambda: many_small_layers(syncbn.SyncBatchNormalization), 64, 2),
    "many small plain layers": (lambda: many_small_layers(keras.layers.BatchNormalization), 64, 1),
}


def make_step(
    name: str, monitored: bool, folder: Path
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step of fit as the trainer runs it, and a reading."""
    make_model, batch, replicas = MODELS[name]
    strategy = mirrored_strategy(replicas) if replicas > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        model = make_model()
        model.compile(
            "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False
        )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * 4, *model.input_shape[1:])).astype(np.float32)
    y = rng.integers(10, size=batch * 4)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(batch, drop_remainder=True)
    iterator = iter(strategy.experimental_distribute_dataset(dataset))
    model.make_train_function()
    monitor = SyncMonitor(folder, interval=NEVER)
    if monitored:
        monitor.set_model(model)
        monitor.on_train_begin()

    def step() -> None:
        float(model.train_function(iterator)["loss"])

    return step, lambda: monitor._watch.read()


def measure(name: str, rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """Figures of steps with the monitor and without, and milliseconds of a reading."""
    with tempfile.TemporaryDirectory() as folder:
        plain, _ = make_step(name, False, Path(folder))
        monitored, read = make_step(name, True, Path(folder))
        for _ in range(3):  # traced, and once more
            plain(), monitored(), read()
        figures = interleaved({BASELINE: plain, "monitored": monitored}, rounds, BASELINE)
        readings = []
        for _ in range(20):
            monitored()
            start = time.perf_counter()
            read()
            readings.append(1e3 * (time.perf_counter() - start))
        return figures, statistics.median(readings)


def main() -> int:
    """Measure every model, print a table, write the JSON."""
    arguments = options(__doc__, rounds=200).parse_args()
    results = []
    for name, (_, batch, replicas) in MODELS.items():
        figures, reading = measure(name, arguments.rounds)
        results.append(
            {
                "model": name,
                "batch": batch,
                "replicas": replicas,
                "figures": figures,
                "milliseconds_of_a_reading": round(reading, 3),
            }
        )
        print(f"{name}, {replicas} replicas; a reading takes {reading:.2f} ms")
        show(figures, BASELINE)
    write(
        arguments.output,
        what="steps of fit, and readings, float32",
        interval=INTERVAL,
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
