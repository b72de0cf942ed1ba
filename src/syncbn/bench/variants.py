"""The layers that are compared: ours, Keras's synchronized and local, TensorFlow's fused kernel."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

__all__ = [
    "FUSED_LOCAL",
    "KERAS_LOCAL",
    "KERAS_SYNC",
    "OURS",
    "fused_local",
    "legacy_variants",
    "variants",
]

OURS = "syncbn"
KERAS_SYNC = "keras_sync"
KERAS_LOCAL = "keras_local"
FUSED_LOCAL = "fused_local"


def variants() -> dict[str, Callable[..., Any]]:
    """What makes each layer, by name; all take the arguments of Keras's."""
    import keras

    import syncbn

    return {
        OURS: syncbn.SyncBatchNormalization,
        KERAS_SYNC: functools.partial(keras.layers.BatchNormalization, synchronized=True),
        KERAS_LOCAL: keras.layers.BatchNormalization,
        FUSED_LOCAL: fused_local(),
    }


def legacy_variants() -> dict[str, Callable[..., Any]]:
    """The same for Keras 2, where it is installed; otherwise nothing."""
    if importlib.util.find_spec("tf_keras") is None:
        return {}
    import tf_keras

    layers = tf_keras.layers
    return {"tf_keras_sync": functools.partial(layers.BatchNormalization, synchronized=True)}


@functools.cache
def fused_local() -> Any:
    """The class of a layer of TensorFlow's fused kernel: the least that local statistics cost."""
    import keras
    import tensorflow as tf

    class FusedLocal(keras.layers.BatchNormalization):
        """TensorFlow's fused kernel with its own gradient, on the part of one replica."""

        def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:  # noqa: ARG002
            """Normalize by the batch of this replica."""
            view = (
                inputs
                if inputs.shape.rank == 4
                else tf.reshape(inputs, (-1, 1, 1, inputs.shape[-1]))
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

    return FusedLocal
