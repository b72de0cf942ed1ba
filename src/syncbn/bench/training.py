"""A whole step of training a small convolutional network, with each normalization in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from syncbn.bench.timing import take_turns

__all__ = ["measure_training"]

CLASSES = 10
# Filters and strides of its convolutions, each with a normalization behind it as in residual
# networks: the share of a step that they take depends little on how many there are.
CONVOLUTIONS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1))


def measure_training(
    strategy: Any,
    makers: Mapping[str, Callable[..., Any]],
    batch: int,
    image: int,
    rounds: int,
    stop: Callable[[], None],
) -> dict[str, list[float]]:
    """Seconds of each variant in each round: forward, backward and optimizer, the loss to Python.

    Args:
        strategy: over whose replicas.
        makers: of the normalization layers, by name; they take Keras's arguments.
        batch: examples on each replica.
        image: height and width of the images, which have three channels.
        rounds: in which they take turns.
        stop: called between steps; raises to end the measurement.
    """
    import numpy as np

    size = batch * strategy.num_replicas_in_sync
    rng = np.random.default_rng(0)
    x = rng.standard_normal((size, image, image, 3), np.float32)
    y = rng.integers(CLASSES, size=size)
    steps = {}
    for name, make in makers.items():
        stop()
        steps[name] = _step(strategy, make, x, y)
    return take_turns(steps, rounds, stop)


def _step(strategy: Any, make: Callable[..., Any], x: Any, y: Any) -> Callable[[], object]:
    import keras

    from syncbn._backends.classifier import Batch
    from syncbn._backends.tensorflow.loop import ClassifierLoop

    def model() -> Any:
        layers = [keras.Input(x.shape[1:])]
        for filters, strides in CONVOLUTIONS:
            layers += [
                keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False),
                make(),
                keras.layers.ReLU(),
            ]
        layers += [
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(CLASSES, activation="softmax"),
        ]
        return keras.Sequential(layers)

    loop = ClassifierLoop(strategy, model, lambda: keras.optimizers.SGD(1e-3, momentum=0.9))
    batch = Batch(x, y, len(x))
    return lambda: loop.step(batch, len(x))
