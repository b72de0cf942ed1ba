"""The model that `fit` and `uneven` train in Keras and in NumPy, and how they are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import syncbn
from syncbn.selftest.checks import Finding
from syncbn.selftest.cluster import Cluster
from syncbn.selftest.reference import Network, largest_gap

__all__ = ["EPOCHS", "compare", "data", "in_float64", "new_model"]

FEATURES, HIDDEN, TARGETS = 6, 7, 2
EPOCHS = 3
# Powers of two and sums of them: Keras rounds some of these numbers to float32 on their way.
RATE, MOMENTUM, EPSILON, MOVING = 1 / 16, 7 / 8, 2**-10, 7 / 8
OF_WEIGHTS = 1e-9
OF_LOSSES = 1e-7  # the logs of replicas are joined with shares in float32


def data(count: int, seed: int) -> tuple[Any, Any]:
    """The same on every worker."""
    rng = np.random.default_rng([seed, 11])
    # A drift: halves of a batch have statistics of their own.
    x = rng.normal(size=(count, FEATURES)) + np.sin(np.arange(count))[:, None]
    return x, rng.normal(size=(count, TARGETS))


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Also the optimizer's and the metrics' variables, which have no dtype of their own."""
    import keras

    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    # Keras does not ask for floatx again once it has made a layer.
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def new_model(cluster: Cluster) -> Any:
    """Built, compiled, with the same weights on every worker."""
    import keras

    layers = keras.layers
    with cluster.strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((FEATURES,)),
                layers.Dense(HIDDEN, use_bias=False),
                syncbn.SyncBatchNormalization(momentum=MOVING, epsilon=EPSILON),
                layers.ReLU(),
                layers.Dense(TARGETS),
            ]
        )
        rng = np.random.default_rng(3)
        for weight in model.trainable_weights:
            shape = tuple(weight.shape)
            weight.assign(rng.normal(size=shape) * 0.5 + (len(shape) == 1))
        model.compile(keras.optimizers.SGD(RATE, momentum=MOMENTUM), "mse")
    return model


def compare(
    cluster: Cluster, batches: list[tuple[Any, Any]], **fit_arguments: Any
) -> list[Finding]:
    """Train by `fit` with these arguments, and in NumPy on these global batches."""
    with in_float64():
        model = new_model(cluster)
        network = Network(_values(model), RATE, MOMENTUM, EPSILON, MOVING)
        history = model.fit(epochs=EPOCHS, shuffle=False, verbose=0, **fit_arguments)
        weights = _values(model)
    losses = [network.epoch(batches) for _ in range(EPOCHS)]
    gaps = [
        largest_gap(observed, expected)
        for observed, expected in zip(weights, network.weights, strict=True)
    ]
    return [
        Finding("weights: gap to NumPy", float(np.max(gaps)), OF_WEIGHTS),
        Finding("losses: gap to NumPy", largest_gap(history.history["loss"], losses), OF_LOSSES),
    ]


def _values(model: Any) -> list[Any]:
    """In Keras's order of layers, which is NumPy's."""
    return [weight.numpy() for layer in model.layers for weight in layer.weights]
