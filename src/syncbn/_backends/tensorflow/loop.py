"""A training loop over the replicas of a strategy that equals the loop on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from syncbn._backends.classifier import Batch, Loop, part_of
from syncbn.errors import WorkerError

__all__ = ["ClassifierLoop"]


class ClassifierLoop(Loop):
    """Trains a classifier with `strategy.run`, and evaluates it on one device.

    Args:
        strategy: over whose replicas each batch is split.
        make_model: returns the built model; called in the strategy's scope.
        make_optimizer: returns a new Keras optimizer; likewise.
    """

    def __init__(
        self, strategy: Any, make_model: Callable[[], Any], make_optimizer: Callable[[], Any]
    ) -> None:
        self._strategy = strategy
        with strategy.scope():
            self.model = make_model()
            self._optimizer = make_optimizer()
            self._optimizer.build(self.model.trainable_variables)
        self._step: Any = None
        images = tf.TensorSpec((None, *self.model.input_shape[1:]), tf.float32)
        self._infer = tf.function(
            lambda x: self.model(x, training=False), input_signature=[images], autograph=False
        ).get_concrete_function()

    def step(self, batch: Batch, size: int) -> tuple[float, float]:
        """One step of the optimizer; the sums over the batch of losses and of right answers."""
        if self._step is None:
            # One trace, for any size of every part. By the sizes of the batches it meets,
            # TensorFlow would trace a ragged one with known sizes on some replicas alone, of which
            # Keras's own synchronization makes different collectives ("Values to regroup").
            arrays = [
                tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in (batch.x, batch.y)
            ]
            numbers = [tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.float32)]
            self._step = tf.function(self._global_step, input_signature=[*arrays, *numbers])
        # Outside of the scope all workers' operations would run on the first one.
        with self._strategy.scope():
            arguments = tf.constant(batch.x), tf.constant(batch.y), batch.full_size, float(size)
            try:
                losses, hits = self._step(*arguments).numpy()
            except tf.errors.UnavailableError as error:
                raise WorkerError(
                    "A step on several workers requires all of them. Received: a collective that "
                    "another worker has left. See what that one printed last."
                ) from error
        return float(losses), float(hits)

    def _global_step(self, x: Any, y: Any, full_size: Any, size: Any) -> Any:
        per_replica = self._strategy.run(self._replica_step, args=(x, y, full_size, size))
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, per_replica, axis=None)

    def _own_part(self, x: Any, y: Any, full_size: Any) -> tuple[Any, Any]:
        """This replica's part of a global batch; of the last one it may be smaller, or empty.

        `experimental_distribute_dataset` with AutoShardPolicy.OFF would give every worker all parts
        of every batch, one after another.
        """
        replicas = self._strategy.num_replicas_in_sync
        if replicas == 1:
            return x, y
        index = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64)
        start, end = part_of(full_size, index, replicas)
        return x[start:end], y[start:end]

    def _replica_step(self, x: Any, y: Any, full_size: Any, size: Any) -> Any:
        x, y = self._own_part(x, y, full_size)
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            probabilities = self.model(x, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(y, probabilities)
            total = tf.reduce_sum(losses)
            objective = self._optimizer.scale_loss(total / tf.cast(size, total.dtype))
        gradients = tape.gradient(objective, [variable.value for variable in variables])
        # Keras's optimizer adds up the gradients of the replicas, but not before Keras 3.2.1.
        if not hasattr(self._optimizer, "_all_reduce_sum_gradients"):
            context = tf.distribute.get_replica_context()
            gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        if isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer):
            gradients = self._overflow_everywhere(gradients)
        self._optimizer.apply(gradients, variables)
        hits = tf.equal(
            tf.argmax(probabilities, axis=-1, output_type=tf.int32), tf.cast(y, tf.int32)
        )
        # As one tensor, which is added up over the replicas at once.
        return tf.stack([total, tf.reduce_sum(tf.cast(hits, total.dtype))])

    def _overflow_everywhere(self, gradients: list[Any]) -> list[Any]:
        """Make an overflow on one replica one on all: Keras's loss scaling asks each by itself."""
        context = tf.distribute.get_replica_context()
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        overflows = context.all_reduce(
            tf.distribute.ReduceOp.SUM, tf.cast(tf.logical_not(finite), tf.float32)
        )
        return [tf.where(overflows > 0, np.nan, gradient) for gradient in gradients]

    def infer(self, x: Any) -> Any:
        """Probabilities in inference, on one device."""
        with self._strategy.scope():
            return self._infer(tf.constant(x)).numpy()

    def weights(self) -> list[Any]:
        """A copy of the model's weights, in Keras's order."""
        with self._strategy.scope():
            return super().weights()
