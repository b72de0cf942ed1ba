"""What is timed: a compiled forward and backward of one layer, and copying as the yardstick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["in_training", "make_step"]


def in_training(layer: Any, x: Any) -> Any:
    """The layer alone."""
    return layer(x, training=True)


def make_step(
    strategy: Any,
    layer: Any,
    shape: tuple[int, ...],
    call: Callable[[Any, Any], Any] = in_training,
) -> Callable[[], None]:
    """A compiled forward and backward of the layer on every replica, each with its own data."""
    import tensorflow as tf

    inputs, cotangents = _different_parts(strategy, shape)
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


def _different_parts(strategy: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Inputs and cotangents of every replica."""
    import numpy as np
    import tensorflow as tf

    rng = np.random.default_rng(0)
    replicas = strategy.num_replicas_in_sync
    arrays = [rng.normal(size=(2, *shape)).astype(np.float32) + r for r in range(replicas)]

    def part(which: int) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(arrays[context.replica_id_in_sync_group][which])
        )

    return part(0), part(1)
