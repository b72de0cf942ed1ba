"""Models written as classes, some with a train step of their own, for `verify` to acquit."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

import syncbn

Norm = syncbn.SyncBatchNormalization


class Subclassed(keras.Model):
    """Blocks in lists and a dictionary, one called twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [layers.Dense(4), layers.Dense(4)]
        self.norms = [Norm(), Norm()]
        self.heads = {"used": layers.Dense(1), "unused": layers.Dense(2)}
        self.twice = layers.Dense(4, activation="tanh")
        self.never = Norm()

    def call(self, inputs: Any, training: Any = None) -> Any:
        x = inputs
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(block(x), training=training)
        return self.heads["used"](self.twice(self.twice(x)))


class OwnStep(Subclassed):
    """Its own step with two losses and a division by the global batch, as TensorFlow teaches."""

    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            context = tf.distribute.get_replica_context()
            size = tf.cast(tf.shape(x)[0], tf.float32)
            whole = context.all_reduce(tf.distribute.ReduceOp.SUM, size)
            first = (
                tf.reduce_sum(tf.square(tf.cast(predicted, tf.float32) - tf.cast(y, tf.float32)))
                / whole
            )
            second = 0.1 * tf.reduce_sum(tf.cast(tf.abs(predicted), tf.float32)) / whole
            loss = self.optimizer.scale_loss(first + second)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"examples": whole}


class TwoOptimizers(keras.Model):
    """A network trained against another, each with an optimizer: steps of a part of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = keras.Sequential([layers.Dense(6), Norm(), layers.ReLU(), layers.Dense(1)])
        self.maker = keras.Sequential([layers.Dense(6), Norm(), layers.ReLU(), layers.Dense(5)])

    def compile(self, **options: Any) -> None:
        super().compile(optimizer=keras.optimizers.Adam(1e-2), **options)
        self.other_optimizer = keras.optimizers.SGD(1e-2)

    def call(self, inputs: Any, training: Any = None) -> Any:
        return self.critic(self.maker(inputs, training=training), training=training)

    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        x, y = data
        context = tf.distribute.get_replica_context()
        whole = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(tf.shape(x)[0], tf.float32))
        with tf.GradientTape(persistent=True) as tape:
            judged = self(x, training=True)
            one = (
                tf.reduce_sum(tf.square(tf.cast(judged, tf.float32) - tf.cast(y, tf.float32)))
                / whole
            )
            other = -tf.reduce_sum(tf.cast(judged, tf.float32)) / whole
        for loss, part, optimizer in (
            (one, self.critic, self.optimizer),
            (other, self.maker, self.other_optimizer),
        ):
            gradients = tape.gradient(loss, part.trainable_variables)
            optimizer.apply_gradients(zip(gradients, part.trainable_variables, strict=True))
        return {"examples": whole}


class Weighted(keras.Model):
    """Normalization that is given weights, and NaN where these are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = layers.Dense(4), Norm(), layers.Dense(1)

    def call(self, inputs: Any, training: Any = None) -> Any:
        weights = keras.ops.abs(inputs[:, 0])
        weights = keras.ops.where(weights < 0.3, keras.ops.zeros_like(weights), weights)
        return self.last(self.norm(self.first(inputs), weights=weights, training=training))


class NanMasked(keras.Model):
    """Its inputs are NaN where they are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = Norm(), layers.Dense(1)

    def call(self, inputs: Any, training: Any = None) -> Any:
        mask = inputs[:, :, 0] > -1.0
        spoilt = keras.ops.where(mask[..., None], inputs, np.nan)
        normalized = self.norm(spoilt, mask=mask, training=training)
        clean = keras.ops.where(mask[..., None], normalized, keras.ops.zeros_like(normalized))
        return self.last(keras.ops.mean(clean, axis=1))


def compiled_two() -> Any:
    model = TwoOptimizers()
    model.compile()
    return model
