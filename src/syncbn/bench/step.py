"""What is timed: a compiled forward and backward of one layer, and copying as the yardstick."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["copy_elements", "in_training", "make_copy", "make_step"]


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
        sources = [x, _tensor(layer.gamma), _tensor(layer.beta)]
        gradients = tape.gradient(y, sources, output_gradients=dy)
        # The whole result is made, and only a number of it leaves the function.
        return y[0, ..., 0], gradients[0][0, ..., 0], gradients[1], gradients[2]

    @tf.function
    def step(x: Any, dy: Any) -> Any:
        return strategy.run(replica_step, args=(x, dy))

    def run() -> None:
        for result in strategy.experimental_local_results(step(inputs, cotangents)[3]):
            result.numpy()

    return run


def copy_elements(strategy: Any) -> int:
    """How many elements each tensor of the yardstick has: more than caches hold.

    On CPU those of [16, 56, 56, 64], the largest input that is measured; GPUs have caches of tens
    of megabytes.
    """
    import tensorflow as tf

    # Without a strategy TensorFlow takes the first GPU that there is.
    devices = (
        strategy.extended.worker_devices
        if tf.distribute.has_strategy() or strategy.num_replicas_in_sync > 1
        else [device.name for device in tf.config.list_logical_devices()]
    )
    on_gpu = any("GPU" in device for device in devices)
    return 2**26 if on_gpu else 16 * 56 * 56 * 64


def make_copy(strategy: Any) -> Callable[[], None]:
    """The yardstick: `x + dy` on every replica at once, which reads two tensors and writes one."""
    import tensorflow as tf

    inputs, cotangents = _different_parts(strategy, (copy_elements(strategy),))

    def replica_copy(x: Any, dy: Any) -> Any:
        total = x + dy
        # All of it leaves the function, so that all of it is written.
        return total, total[0]

    @tf.function
    def copy(x: Any, dy: Any) -> Any:
        return strategy.run(replica_copy, args=(x, dy))

    def run() -> None:
        for result in strategy.experimental_local_results(copy(inputs, cotangents)[1]):
            result.numpy()

    return run


def _tensor(variable: Any) -> Any:
    """What the tape knows of a variable: Keras 3's holds it, one of tf_keras is it."""
    return variable if callable(variable.value) else variable.value


@functools.lru_cache(maxsize=1)
def _different_parts(strategy: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Inputs and cotangents of every replica, the same tensors for all variants of a shape.

    With tensors of its own each variant would find them evicted from the caches by those of the
    others, where training finds what the layer before has just written.
    """
    import numpy as np
    import tensorflow as tf

    replicas = strategy.num_replicas_in_sync
    generators = [np.random.default_rng(replica) for replica in range(replicas)]

    def part() -> Any:
        def values(context: Any) -> Any:
            replica = context.replica_id_in_sync_group
            return tf.constant(
                generators[replica].standard_normal(shape, np.float32) + np.float32(replica)
            )

        return strategy.experimental_distribute_values_from_function(values)

    return part(), part()
