"""Loss scaling skips a step on every replica, or on none.

Keras looks for overflows in each replica's own gradients: where one has some and another has none,
the first skips, the second does not, and their weights part; several workers wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer

from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import in_replica, sum_over_replicas

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras asks only the replica's own gradients."""
    return source_probe(
        "keras.src.optimizers.loss_scale_optimizer.LossScaleOptimizer.check_finite",
        broken="return ops.all(ops.convert_to_tensor(finite_grads))",
        mended="all_reduce",
    )


def patches() -> list[Patch]:
    """`check_finite`."""
    return [Patch(LossScaleOptimizer, "check_finite", _checker)]


def _checker(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_finite(optimizer: Any, grads: Any) -> Any:
        finite = original(optimizer, grads)
        if not in_replica():
            return finite
        overflows = tf.cast(tf.logical_not(finite), tf.float32)
        return tf.equal(sum_over_replicas(overflows), 0.0)

    return check_finite
