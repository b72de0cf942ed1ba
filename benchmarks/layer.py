"""One batch normalization layer, forward and backward, on R replicas: ours against Keras's.

The variants run in turn in one process, so that a change of the machine's speed meets all of them;
a figure is the median of the ratios of one round, with the quartiles as its spread.

    python benchmarks/layer.py --output benchmarks/results/layer.json
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import syncbn
from machine import options, write
from syncbn._backends.tensorflow.replicas import mirrored_strategy

SHAPES = ((16, 56, 56, 64), (16, 14, 14, 256), (64, 128), (1024, 512))
BASELINE = "keras_sync"


class FusedLocal(keras.layers.BatchNormalization):
    """TensorFlow's fused kernel with its own gradient, on the part of one replica."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:  # noqa: ARG002
        """Normalize by the batch of this replica."""
        view = (
            tf.reshape(inputs, (-1, 1, 1, inputs.shape[-1])) if inputs.shape.rank != 4 else inputs
        )
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=view,
            scale=self.gamma.value,
            offset=self.beta.value,
            mean=tf.zeros(0),
            variance=tf.zeros(0),
            epsilon=self.epsilon,
            is_training=True,
        )
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving.value * self.momentum + batch * (1 - self.momentum))
        return tf.reshape(outputs, tf.shape(inputs))


VARIANTS: dict[str, Callable[[], keras.layers.Layer]] = {
    "syncbn": syncbn.SyncBatchNormalization,
    BASELINE: lambda: keras.layers.BatchNormalization(synchronized=True),
    "keras_local": keras.layers.BatchNormalization,
    "fused_local": FusedLocal,
}


def in_training(layer: keras.layers.Layer, x: Any) -> Any:
    """The layer alone."""
    return layer(x, training=True)


def make_step(
    strategy: tf.distribute.Strategy,
    layer: keras.layers.Layer,
    shape: tuple[int, ...],
    call: Callable[[keras.layers.Layer, Any], Any] = in_training,
) -> Callable[[], None]:
    """A compiled forward and backward of the layer on every replica, each with its own data."""
    rng = np.random.default_rng(0)
    replicas = strategy.num_replicas_in_sync
    arrays = [rng.normal(size=(2, *shape)).astype(np.float32) + r for r in range(replicas)]

    def part(which: int) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(arrays[context.replica_id_in_sync_group][which])
        )

    inputs, cotangents = part(0), part(1)
    with strategy.scope():
        layer.build((None, *shape[1:]))

    def replica_step(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(layer, x)
        gradients = tape.gradient(y, [x, layer.gamma.value, layer.beta.value], output_gradients=dy)
        # The whole result is made, and only a number of it leaves the function.
        return y[0, ..., 0], gradients[0][0, ..., 0], gradients[1], gradients[2]

    @tf.function
    def step(x: Any, dy: Any) -> Any:
        return strategy.run(replica_step, args=(x, dy))

    def run() -> None:
        for result in strategy.experimental_local_results(step(inputs, cotangents)[3]):
            result.numpy()

    return run


def measure(shape: tuple[int, ...], replicas: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each variant and its speed relative to the baseline, from interleaved rounds."""
    strategy = mirrored_strategy(replicas)
    steps = {name: make_step(strategy, make(), shape) for name, make in VARIANTS.items()}
    return interleaved(steps, rounds, BASELINE)


def interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, baseline: str
) -> dict[str, dict[str, float]]:
    """Figures of the steps, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for turn in range(rounds):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: _summary(seconds[name], seconds[baseline], baseline) for name in steps}


def _summary(seconds: list[float], others: list[float], baseline: str) -> dict[str, float]:
    ratios = [other / own for own, other in zip(seconds, others, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "milliseconds_median": round(1e3 * statistics.median(seconds), 3),
        f"times_as_fast_as_{baseline}": round(median, 3),
        "lower_quartile": round(low, 3),
        "upper_quartile": round(high, 3),
    }


def show(figures: dict[str, dict[str, float]], baseline: str) -> None:
    """Print a line for each variant."""
    for name, figure in figures.items():
        print(
            f"  {name:21} {figure['milliseconds_median']:8.2f} ms   "
            f"{figure[f'times_as_fast_as_{baseline}']:5.2f} times as fast as {baseline} "
            f"({figure['lower_quartile']:.2f} to {figure['upper_quartile']:.2f})"
        )


def main() -> int:
    """Measure every shape, print a table, write the JSON."""
    parser = options(__doc__, rounds=40)
    parser.add_argument("--replicas", type=int, default=2)
    arguments = parser.parse_args()
    results = []
    for shape in SHAPES:
        figures = measure(shape, arguments.replicas, arguments.rounds)
        results.append({"shape_per_replica": shape, "variants": figures})
        print(f"{list(shape)} × {arguments.replicas} replicas")
        show(figures, BASELINE)
    write(
        arguments.output,
        what="forward and backward of one layer, float32",
        replicas=arguments.replicas,
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
