"""A model trained on one of Keras's backends, saved, and trained on by another.

Each backend in a process of its own, which does all the jobs, since it takes seconds to start:
`python -m tests.travel FOLDER` with its KERAS_BACKEND saves, waits for a line, then loads.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

import syncbn

BACKENDS = ("jax", "tensorflow", "torch")
PRECISIONS = ("float32", "float64")
STEPS = 3
EXAMPLES = 16  # a power of two, of which even a float32 has the inverse

# What a process says.
SAVED, TRAINED = "saved", "trained"


def batches(stage: str, precision: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of a mean and scale that change, so that each step moves every statistic.

    All are float32 numbers, as the rate of learning is: Keras rounds some of what it is given.
    """
    rng = np.random.default_rng(1 if stage == "start" else 2)
    for step in range(STEPS):
        x = rng.normal(step, 1 + step, (EXAMPLES, 6)).astype("f4")
        yield x.astype(precision), np.sin(x[:, :1]).astype(precision)


@keras.saving.register_keras_serializable("tests")
class Product(keras.layers.Layer):
    """A dense layer by the framework's own `@`: in float64 Keras's rounds to float32 on torch."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), name="kernel")

    def call(self, inputs: Any) -> Any:
        return inputs @ self.kernel.value

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


def squared_error(y: Any, predicted: Any) -> Any:
    """One for each example; Keras's own mean is of float32 on JAX and torch."""
    return ((y - predicted) ** 2)[:, 0]


def make_model() -> Any:
    """Every kind of state that the layer has.

    Of the activations Keras's tanh is of float32 on JAX, whatever it is given.
    """
    clipping = {"rmin": 0.8, "rmax": 1.3, "dmax": 0.4}
    model = keras.Sequential(
        [
            keras.Input((6,)),
            Product(8),
            syncbn.SyncBatchNormalization(
                renorm=True, renorm_clipping=clipping, momentum=0.8, activation="silu"
            ),
            Product(7),
            syncbn.SyncBatchNormalization(
                momentum=None, unbiased_moving_variance=True, activation="silu"
            ),
            Product(6),
            syncbn.SyncBatchNormalization(),
            Product(1),
        ]
    )
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0.1, 0.5, weight.shape).astype("f4"))
    return model


def train(model: Any, stage: str, precision: str) -> None:
    """Some steps by an optimizer of this backend's own.

    Keras's optimizers do not move: one that was saved on torch is torch's wherever it is loaded,
    and fails at the first step on JAX and TensorFlow. So it is one that has no state.
    """
    model.compile(keras.optimizers.SGD(0.0625), squared_error)
    for x, y in batches(stage, precision):
        model.train_on_batch(x, y)


def save_weights(model: Any, path: Path) -> None:
    np.savez(path, *model.get_weights())


def start(folder: Path, backend: str, precision: str) -> None:
    """Train, save; train on alone, which is what all others are compared with."""
    model = make_model()
    train(model, "start", precision)
    model.save(folder / f"{backend}-{precision}.keras")
    save_weights(model, folder / f"{backend}-{precision}-half.npz")
    train(model, "go_on", precision)
    save_weights(model, folder / f"{backend}-{precision}-alone.npz")


def go_on(folder: Path, backend: str, precision: str) -> None:
    """Load what each backend has saved, and train on here."""
    for origin in BACKENDS:
        model = keras.models.load_model(folder / f"{origin}-{precision}.keras", compile=False)
        train(model, "go_on", precision)
        save_weights(model, folder / f"{origin}-{precision}-on-{backend}.npz")
    # The control: the same without the number of batches that were seen.
    model = keras.models.load_model(folder / f"{backend}-{precision}.keras", compile=False)
    model.layers[3].num_batches_tracked.assign(0)
    train(model, "go_on", precision)
    save_weights(model, folder / f"{backend}-{precision}-forgetful.npz")


def run(folder: Path) -> None:
    """All of it, on every backend side by side; each of them loads when all have saved."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_process(folder, backend)) for backend in BACKENDS]
        for process in processes:
            _read_until(SAVED, process)
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            _read_until(TRAINED, process)


@contextlib.contextmanager
def _process(folder: Path, backend: str) -> Iterator[Any]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.travel", str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "KERAS_BACKEND": backend},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _read_until(word: str, process: Any) -> None:
    lines = []
    for line in process.stdout:
        if line.strip() == word:
            return
        lines.append(line)
    raise AssertionError("".join(lines) or "a process of a backend ended without a word")


def main() -> None:
    folder = Path(sys.argv[1])
    for stage in (start, go_on):
        for precision in PRECISIONS:
            with precision_of(precision):
                stage(folder, keras.backend.backend(), precision)
        print(SAVED if stage is start else TRAINED, flush=True)
        if stage is start:
            sys.stdin.readline()


@contextlib.contextmanager
def precision_of(name: str) -> Iterator[None]:
    """A scope where models are of that dtype, which on JAX exists by an option alone."""
    enabled = contextlib.nullcontext()
    if name == "float64" and keras.backend.backend() == "jax":
        import jax

        enabled = jax.enable_x64(True)
    before = keras.config.floatx()
    with enabled:
        keras.config.set_floatx(name)
        keras.config.set_dtype_policy(name)
        yield
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(before)


if __name__ == "__main__":
    main()
