"""Models whose population statistics NumPy gives batch by batch, in float64, and data for them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

import syncbn
from tests.harness import numbers

EPSILON = 1e-3
# The last is small, and leaves replicas empty.
SIZES = (16, 11, 1)
TIMES, FEATURES = 6, 5


class Statistics(NamedTuple):
    """Of all elements that a layer has normalized."""

    count: float
    mean: np.ndarray  # (C,)
    variance: np.ndarray  # (C,), biased


def in_float64() -> Any:
    """A scope where there is float64, for JAX."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


def data(sizes: Sequence[int] = SIZES, seed: int = 0) -> list[np.ndarray]:
    """Batches of sequences, of which some steps are 0, for a mask; batches differ by their mean.

    Numbers that float32 holds, which Keras casts arrays to.
    """
    rng = np.random.default_rng(seed)
    x = (
        rng.normal(size=(sum(sizes), TIMES, FEATURES))
        + np.linspace(0, 3, sum(sizes))[:, None, None]
    )
    x[rng.random(x.shape[:2]) < 0.3] = 0.0
    x[:, 0] += 1.0  # no example is masked as a whole
    return np.split(x.astype("float32"), np.cumsum(sizes)[:-1])


class Mix(keras.layers.Layer):
    """`z + z² / 5` for `z = x @ kernel`, in float64 too, which Keras's dense layers round."""

    def __init__(self, kernel: np.ndarray, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.numbers, self.supports_masking = kernel, True

    def build(self, _: Any) -> None:
        constant = keras.initializers.Constant(self.numbers)
        self.kernel = self.add_weight(shape=self.numbers.shape, initializer=constant)

    def call(self, inputs: Any) -> Any:
        mixed = inputs @ keras.ops.convert_to_tensor(self.kernel)
        return mixed + mixed * mixed / 5

    @staticmethod
    def expected(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        mixed = x @ kernel
        return mixed + mixed * mixed / 5


def kernels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    # Float32's numbers, which a model in float32 has too.
    first = rng.normal(size=(FEATURES, 4)).astype("float32")
    return first, rng.normal(size=(4, 2)).astype("float32")


def make_model(
    masked: bool = True, dtype: str = "float64", first: Any = None, second: Any = None
) -> Any:
    """Two batch normalizations, ours and Keras's, of which the second sees what the first gives.

    What must be off in between: half of all elements dropped.
    """
    one, two = kernels()
    first = first or syncbn.SyncBatchNormalization(momentum=0.7, dtype=dtype, name="first")
    second = second or keras.layers.BatchNormalization(momentum=0.4, dtype=dtype, name="second")
    return keras.Sequential(
        [
            keras.Input((TIMES, FEATURES), dtype=dtype),
            *([keras.layers.Masking(dtype=dtype)] if masked else []),
            Mix(one, dtype=dtype),
            first,
            keras.layers.Dropout(0.5, dtype=dtype),
            Mix(two, dtype=dtype),
            second,
        ]
    )


def expected(batches: Sequence[np.ndarray], masked: bool = True) -> list[Statistics]:
    """The population statistics of both layers, batch after batch."""
    one, two = (kernel.astype("float64") for kernel in kernels())
    seen: list[list[np.ndarray]] = [[], []]
    for batch in batches:
        x = batch.astype("float64").reshape(-1, FEATURES)
        x = x[(x != 0).any(axis=1)] if masked else x
        z = Mix.expected(x, one)
        seen[0].append(z)
        z = (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + EPSILON)
        seen[1].append(Mix.expected(z, two))
    return [statistics(np.concatenate(rows)) for rows in seen]


def statistics(rows: np.ndarray) -> Statistics:
    """Those of rows of channels."""
    return Statistics(float(len(rows)), rows.mean(axis=0), rows.var(axis=0))


def held(model: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """What its layers hold: moving mean and variance of each."""
    return [
        (numbers(layer.moving_mean), numbers(layer.moving_variance))
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def assert_population(model: Any, wanted: Sequence[Statistics], tolerance: float) -> None:
    """The layers hold these; errors relative to the largest variance, and mean and deviation."""
    found = held(model)
    assert len(found) == len(wanted)
    for (mean, variance), statistics in zip(found, wanted, strict=True):
        size = np.abs(statistics.mean).max() + np.sqrt(statistics.variance).max()
        assert np.abs(mean - statistics.mean).max() <= tolerance * size
        error = np.abs(variance - statistics.variance).max()
        assert error <= tolerance * statistics.variance.max()


def state_of(model: Any) -> dict[str, Any]:
    """All that a recalibration that fails must leave: weights, classes, attributes."""
    layers = [layer for layer in model._flatten_layers() if layer is not model]
    return {
        "weights": [numbers(variable).tobytes() for variable in model.variables],
        "classes": [type(layer) for layer in layers],
        "attributes": [sorted(vars(layer)) for layer in layers],
        "momentum": [getattr(layer, "momentum", None) for layer in layers],
    }
