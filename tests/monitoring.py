"""Models and data for the tests of SyncMonitor, and NumPy's values of what it logs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import syncbn
from syncbn.monitoring import SyncMonitor

EPSILON = 1e-3
TIMES, FEATURES = 4, 3


def data(rows: int = 22, seed: int = 0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Sequences that drift from example to example, with steps of 0 for a mask, and targets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, TIMES, FEATURES)) * np.linspace(1, 2, rows)[:, None, None]
    x += np.linspace(0, 2, rows)[:, None, None] + offset
    x[rng.random(x.shape[:2]) < 0.3] = 0.0
    x[:, 0] += 1.0
    return x.astype("float32"), rng.normal(size=(rows, 2)).astype("float32")


class Poison(keras.layers.Layer):
    """NaN where an example has a number above 1000; finite in the layers before."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.supports_masking = True

    def call(self, inputs: Any, raw: Any) -> Any:
        large = keras.ops.max(raw, axis=(1, 2), keepdims=True) > 1000
        return keras.ops.where(large, float("nan"), inputs)


class Nested(keras.Model):
    """A dense layer and a normalization, to which the mask comes."""

    def __init__(self, normalization: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.dense, self.normalization = keras.layers.Dense(4), normalization
        self.supports_masking = True

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return self.normalization(self.dense(inputs), training=training, mask=mask)


class OwnStep(keras.Model):
    """A model with a step of its own, which sees noisy inputs."""

    def train_step(self, *arguments: Any) -> Any:
        *state, (x, y) = arguments
        return super().train_step(*state, (x * 2, y))


def model(model_class: type = keras.Model, **compiled: Any) -> Any:
    """A mask, a nested model, a layer that is called twice, one that is frozen, dropout."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((TIMES, FEATURES))
    masked = keras.layers.Masking()(inputs)
    x = syncbn.SyncBatchNormalization(name="first")(masked)
    shared = keras.layers.BatchNormalization(name="shared")
    nested = Nested(shared, name="nested")
    x = Poison()(nested(x), inputs)
    x = shared(keras.layers.Dense(4, activation="tanh")(x))
    x = keras.layers.Dropout(0.3, seed=5)(x)
    frozen = keras.layers.BatchNormalization(name="frozen", trainable=False)
    x = syncbn.SyncBatchNormalization(name="last")(frozen(x))
    made = model_class(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(x)))
    arguments: dict[str, Any] = {"optimizer": "adam", "loss": "mse", **compiled}
    made.compile(**arguments)
    return made


def trained(
    made: Any, x: Any, y: Any, *callbacks: Any, batch_size: int = 5, epochs: int = 2
) -> dict[str, list[float]]:
    """The history of a fit in the order of the data."""
    with warnings.catch_warnings():
        # Of plain layers on replicas, and of NaN; what they say has tests of its own.
        warnings.filterwarnings("ignore", message="SyncMonitor")
        fitted = made.fit(
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
        )
    history: dict[str, list[float]] = fitted.history
    return history


def bits_of(made: Any) -> list[bytes]:
    """Every variable of the model and its optimizer; of NaN the sign says nothing."""
    variables = [*made.variables, *made.optimizer.variables]
    arrays = [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]
    return [
        np.where(array == array, array, np.nan).astype(array.dtype).tobytes() for array in arrays
    ]


def expected(parts: Sequence[np.ndarray], epsilon: float = EPSILON) -> dict[str, float]:
    """What is logged of a layer, whose elements on each replica are given as (elements, C)."""
    parts = [np.asarray(part, np.float64) for part in parts if len(part)]
    whole = np.concatenate(parts)
    scale = whole.var(axis=0) + epsilon
    d = [np.sqrt(np.mean((part.mean(axis=0) - whole.mean(axis=0)) ** 2 / scale)) for part in parts]
    v = [np.mean(np.abs(np.log((part.var(axis=0) + epsilon) / scale))) for part in parts]
    return {
        "mean_distance": max(d),
        "mean_distance_average": float(np.mean(d)),
        "variance_distance": max(v),
        "variance_distance_average": float(np.mean(v)),
    }


def assert_logged(
    history: dict[str, list[float]], layer: str, wanted: dict[str, float], tolerance: float = 1e-5
) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(
            history[f"sync/{layer}/{name}"][-1], value, rtol=tolerance, atol=tolerance
        )


class Watcher(keras.callbacks.Callback):
    """Notes what other callbacks would find in the middle of training."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.classes, self.weights = path, set(), set()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self.classes |= {type(layer) for layer in self.model._flatten_layers()}
        self.weights.add(len(self.model.weights))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self.model.save_weights(self.path)


def monitor(**arguments: Any) -> SyncMonitor:
    return SyncMonitor(**arguments)
