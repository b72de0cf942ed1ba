"""Small models with given weights, data of normal numbers, and what is observed of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

import syncbn
from tests.scenarios.world import World

__all__ = [
    "classes",
    "compile_model",
    "dense_model",
    "fit",
    "gather_history",
    "normal",
    "observe_model",
    "set_weights",
    "targets",
]

# An epoch of 65 examples in batches of 64: the last batch is one example, and a replica has none.
FEATURES = 6


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers: no two examples are alike."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def classes(size: int, count: int = 3, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=size)


def targets(size: int, units: int = 2, seed: int = 1) -> np.ndarray:
    """Random, and so are the cotangents."""
    return normal(size, units, seed=seed)


def set_weights(model: Any, seed: int = 7) -> None:
    """Numbers of the seed into every trainable weight, as wide as suits their inputs."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        width = np.sqrt(np.prod(variable.shape[:-1]) or 1)
        value = rng.normal(size=variable.shape) / max(width, 1.0)
        if "gamma" in variable.path:
            value = 1 + 0.1 * value
        variable.assign(value.astype("float32"))


def dense_model(
    world: World,
    *,
    normalized: bool = True,
    units: int = 2,
    features: int = FEATURES,
    layers: tuple[Any, ...] = (),
    **compiled: Any,
) -> Any:
    """Two dense layers with a synchronized layer between, in the world's scope.

    Args:
        world: where.
        normalized: with the synchronized layer.
        units: of the output.
        features: of the input.
        layers: functions that make further layers, after the first dense one.
        **compiled: of `compile_model`.
    """
    with world.scope():
        # Before a normalization the gradient of a bias is 0, and rounding is all that moves it.
        first = keras.layers.Dense(5, use_bias=not normalized)
        model = keras.Sequential([keras.Input((features,)), first])
        if normalized:
            model.add(syncbn.SyncBatchNormalization(momentum=0.8))
        for make in layers:
            model.add(make())
        model.add(keras.layers.Activation("tanh"))
        model.add(keras.layers.Dense(units))
        set_weights(model)
        compile_model(model, **compiled)
    return model


def compile_model(model: Any, **options: Any) -> None:
    """Compile; with plain SGD and the squared error where nothing else is said.

    What has variables is given as a function that makes it, called in the scope.
    """
    made = {"optimizer": lambda: keras.optimizers.SGD(0.1), "loss": "mse", **options}
    for name in ("optimizer", "metrics", "weighted_metrics"):
        if callable(made.get(name)):
            made[name] = made[name]()
    model.compile(**made)


def gather_history(history: Any, prefix: str = "history") -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": np.array(values) for name, values in history.history.items()}


def observe_model(model: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Every weight, moving statistic and variable of the optimizer, but no seed's state."""
    observed = {}
    for index, variable in enumerate(model.variables):
        if "seed_generator" not in variable.path and variable.dtype != "string":
            observed[f"{prefix}weight{index}/{variable.name}"] = np.array(variable)
    for index, variable in enumerate(model.optimizer.variables if model.optimizer else ()):
        observed[f"{prefix}optimizer{index}"] = np.array(variable)
    return observed


def fit(
    model: Any,
    x: Any,
    y: Any = None,
    *,
    predict: Any = None,
    observe: bool = True,
    **options: Any,
) -> Mapping[str, np.ndarray]:
    """Two epochs in the given order, and everything that they changed."""
    settings = {"epochs": 2, "shuffle": False, "verbose": 0}
    if isinstance(x, np.ndarray | dict | list):
        settings["batch_size"] = 64
    observed = gather_history(model.fit(x, y, **{**settings, **options}))
    if observe:
        observed |= observe_model(model)
    if predict is not None:
        observed["predicted"] = model.predict(predict, batch_size=64, verbose=0)
    return observed
