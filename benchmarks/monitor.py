"""What SyncMonitor costs: a hundred steps with it at its default interval, and without, in turn.

A residual network as people train, and one that does not favour it: many small layers on vectors,
where a step is little but the overhead of its operations. Each block of steps is one interval:
every step tells, one is read, with a file for TensorBoard.

    python benchmarks/monitor.py --output benchmarks/results/monitor.json
"""

from __future__ import annotations

import sys
import tempfile
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

INTERVAL = 100
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


def make_block(name: str, monitored: bool, folder: Path) -> Callable[[], object]:
    """A hundred steps of fit as the trainer runs them."""
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
    if monitored:
        monitor = SyncMonitor(folder, interval=INTERVAL)
        monitor.set_model(model)
        monitor.on_train_begin()

    def block() -> None:
        for _ in range(INTERVAL):
            logs = model.train_function(iterator)
        float(logs["loss"])

    return block


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Figures of blocks with the monitor and without."""
    with tempfile.TemporaryDirectory() as folder:
        blocks = {
            BASELINE: make_block(name, False, Path(folder)),
            "monitored": make_block(name, True, Path(folder)),
        }
        return interleaved(blocks, rounds, BASELINE)


def main() -> int:
    """Measure every model, print a table, write the JSON."""
    arguments = options(__doc__, rounds=10).parse_args()
    results = []
    for name, (_, batch, replicas) in MODELS.items():
        figures = measure(name, arguments.rounds)
        results.append({"model": name, "batch": batch, "replicas": replicas, "figures": figures})
        print(f"{name}, {replicas} replicas")
        show(figures, BASELINE)
    write(
        arguments.output,
        what=f"{INTERVAL} steps of fit, of which one is read, float32",
        interval=INTERVAL,
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
