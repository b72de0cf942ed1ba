"""Models and steps that replicas train in another way than one device, one defect each.

With each the cause that `verify` is to name, and the layer, as a part of its path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from syncbn.verification.verdict import Cause
from tests.verified.acquitted import (
    Data,
    Norm,
    compiled,
    convolutional,
    dense,
    floats,
    padded,
)


class Defect(NamedTuple):
    """A model with one defect.

    Attributes:
        build: makes and compiles it.
        cause: that the first finding is to name.
        layer: that it is to name, as a part of its path; "" for the model as a whole.
        data: of so many examples.
        ragged: whether it shows in uneven parts alone; else batches are full.
        repair: whether Keras's trainer is repaired, which would hide what Keras does wrong.
    """

    build: Callable[[], Any]
    cause: Cause
    layer: str = ""
    data: Callable[[int, np.random.Generator], Data] = floats(5)
    ragged: bool = False
    repair: bool = True


def _replicas() -> Any:
    import tensorflow as tf

    return tf.distribute.get_replica_context()


def _sum(value: Any) -> Any:
    import tensorflow as tf

    return _replicas().all_reduce(tf.distribute.ReduceOp.SUM, value)


def _number() -> Any:
    """Of the replica, from 0."""
    context = _replicas()  # none while Keras asks for shapes
    return keras.ops.cast(0 if context is None else context.replica_id_in_sync_group, "float32")


class Standardized(layers.Layer):
    """A formula of the user's own, over the part that the replica has."""

    def call(self, inputs: Any) -> Any:
        return (inputs - keras.ops.mean(inputs, 0)) / (keras.ops.std(inputs, 0) + 1e-3)


class MeanOfMeans(layers.BatchNormalization):
    """A homemade synchronization: the mean over replicas of their means, however many examples."""

    def _moments(self, inputs: Any, mask: Any) -> Any:
        del mask
        mean, square = keras.ops.mean(inputs, 0), keras.ops.mean(keras.ops.square(inputs), 0)
        count = float(_replicas().num_replicas_in_sync)
        mean, square = _sum(mean) / count, _sum(square) / count
        return mean, square - keras.ops.square(mean)


class LocalMoving(Norm):
    """Right outputs, and a moving mean of its own part."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        outputs = super().call(inputs, training=training, mask=mask)
        if training:
            self.moving_mean.assign(0.9 * self.moving_mean + 0.1 * keras.ops.mean(inputs, 0))
        return outputs


class CountsReplicas(layers.Layer):
    """A moving state that is summed over replicas, without any part in the outputs."""

    def build(self, shape: Any) -> None:
        del shape
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False, name="seen")

    def call(self, inputs: Any, training: Any = None) -> Any:
        if training:
            self.seen.assign(0.5 * self.seen + _sum(keras.ops.ones(())))
        return inputs


class Step(keras.Model):
    """A step of the user's own, right but for what a subclass breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = layers.Dense(6), Norm(), layers.Dense(1)

    def call(self, inputs: Any, training: Any = None) -> Any:
        hidden = keras.ops.relu(self.norm(self.first(inputs), training=training))
        return self.last(hidden)

    def own_loss(self, losses: Any) -> Any:
        return keras.ops.sum(losses) / _sum(keras.ops.cast(keras.ops.shape(losses)[0], "float32"))

    def own_gradients(self, gradients: Any) -> Any:
        return gradients

    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.own_loss(keras.ops.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        gradients = self.own_gradients(gradients)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"examples": _sum(keras.ops.cast(keras.ops.shape(x)[0], "float32"))}


class NotDivided(Step):
    """A mean over the replica's examples, as it is right on one device."""

    def own_loss(self, losses: Any) -> Any:
        return keras.ops.mean(losses)


class MeanDivided(Step):
    """The same by the number of replicas: wrong where their parts are uneven."""

    def own_loss(self, losses: Any) -> Any:
        return keras.ops.mean(losses) / _replicas().num_replicas_in_sync


class DividedTwice(Step):
    """By the global batch, twice on more than one replica."""

    def own_loss(self, losses: Any) -> Any:
        right = super().own_loss(losses)
        return right / _sum(keras.ops.ones(()))


class ClippedApart(Step):
    """Each replica clips its own share of the gradient."""

    def own_gradients(self, gradients: Any) -> Any:
        import tensorflow as tf

        return [tf.clip_by_norm(gradient, 0.05) for gradient in gradients]


class GradientsOff(Step):
    """By a ten thousandth, and all else is right."""

    def own_gradients(self, gradients: Any) -> Any:
        share = 1.0 + 1e-4 * (_sum(keras.ops.ones(())) - 1.0)
        return [gradient * share for gradient in gradients]


class Alternating(layers.Layer):
    """Every other example twice: on replicas the same ones, in another order others."""

    def call(self, inputs: Any) -> Any:
        places = keras.ops.arange(keras.ops.shape(inputs)[0])
        return inputs * keras.ops.cast(1 + places % 2, inputs.dtype)[:, None]


class AlternatingGradientsOff(GradientsOff):
    """The same, where another order of the examples changes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.alternating = Alternating()

    def call(self, inputs: Any, training: Any = None) -> Any:
        return super().call(self.alternating(inputs), training=training)


class AppliedApart(Step):
    """Weights follow each replica's own gradient, beside the optimizer."""

    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.own_loss(keras.ops.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        for gradient, variable in zip(gradients, self.trainable_variables, strict=True):
            variable.assign(variable - 0.1 * gradient)
        return {"examples": _sum(keras.ops.cast(keras.ops.shape(x)[0], "float32"))}


class NoisyOptimizer(keras.optimizers.SGD):
    """Its steps depend on the number of replicas."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        import tensorflow as tf

        count = tf.distribute.get_strategy().num_replicas_in_sync
        super().update_step(gradient, variable, learning_rate * float(count))


class MeanOfBatches(keras.metrics.Metric):
    """The mean over replicas of their mean error."""

    def __init__(self, name: str = "mean_of_batches") -> None:
        super().__init__(name=name)
        self.total = self.add_weight(shape=(), initializer="zeros", name="total")
        self.count = self.add_weight(shape=(), initializer="zeros", name="count")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        del sample_weight
        self.total.assign(self.total + keras.ops.mean(keras.ops.abs(y_true - y_pred)))
        self.count.assign(self.count + 1.0)

    def result(self) -> Any:
        return self.total / self.count


class NanOnOne(layers.Layer):
    """NaN on the second replica alone."""

    def call(self, inputs: Any) -> Any:
        return keras.ops.where(_number() > 0, inputs * np.nan, inputs)


def far(offset: float) -> Callable[[int, np.random.Generator], Data]:
    """Images whose mean is so many standard deviations."""

    def data(n: int, random: np.random.Generator) -> Data:
        x, y = floats(8, 8, 3)(n, random)
        return x + np.float32(offset), y

    return data


def augmented(layer: Callable[[], Any]) -> Callable[[], Any]:
    """The convolutional model with a layer in front that draws random numbers."""

    def build() -> Any:
        model = keras.Sequential([keras.Input((8, 8, 3)), layer(), *convolutional().layers])
        return compiled(model)

    return build


def masked(norm: Callable[[], Any]) -> Any:
    return compiled(
        keras.Sequential(
            [
                keras.Input((6, 3)),
                layers.Masking(),
                layers.Dense(4),
                norm(),
                layers.GlobalAveragePooling1D(),
                layers.Dense(1),
            ]
        )
    )


def stepped(model: type) -> Callable[[], Any]:
    return lambda: compiled(model(), keras.optimizers.SGD(0.05))


Plain = layers.BatchNormalization
IMAGES = floats(8, 8, 3)
DEFECTS: dict[str, Defect] = {
    "plain": Defect(
        lambda: compiled(convolutional(norm=Plain)), Cause.LOCAL, "batch_normalization", IMAGES
    ),
    "groups of one": Defect(
        lambda: compiled(dense(norm=lambda: Norm(group_size=1))), Cause.LOCAL, "batch_norm"
    ),
    "keras, masked": Defect(
        lambda: masked(lambda: Plain(synchronized=True)),
        Cause.LOCAL_MASKED,
        "batch_normalization",
        padded,
    ),
    "keras at 1e4": Defect(
        lambda: compiled(
            keras.Sequential(
                [
                    keras.Input((8, 8, 3)),
                    Plain(synchronized=True),
                    layers.Flatten(),
                    layers.Dense(1),
                ]
            )
        ),
        Cause.CANCELLATION,
        "batch_normalization",
        far(1e4),
    ),
    "own formula": Defect(
        lambda: compiled(dense(norm=Standardized)), Cause.BATCH_DEPENDENT, "standardized"
    ),
    "mean of means": Defect(
        lambda: compiled(dense(norm=MeanOfMeans)), Cause.EQUAL_WEIGHTS, "mean_of_means", ragged=True
    ),
    "local moving mean": Defect(
        lambda: compiled(dense(norm=LocalMoving)), Cause.STATISTICS, "local_moving"
    ),
    "counts replicas": Defect(
        lambda: compiled(dense(norm=CountsReplicas)), Cause.STATISTICS, "counts_replicas"
    ),
    "loss not divided": Defect(stepped(NotDivided), Cause.LOSS_COUNT),
    "loss a mean of means": Defect(stepped(MeanDivided), Cause.EQUAL_WEIGHTS, ragged=True),
    "loss divided twice": Defect(stepped(DividedTwice), Cause.LOSS_COUNT),
    "clipped apart": Defect(stepped(ClippedApart), Cause.GRADIENTS),
    "gradients off": Defect(stepped(GradientsOff), Cause.GRADIENTS),
    "alternating, gradients off": Defect(stepped(AlternatingGradientsOff), Cause.GRADIENTS),
    "applied apart": Defect(stepped(AppliedApart), Cause.NOT_SUMMED),
    "optimizer": Defect(lambda: compiled(dense(), NoisyOptimizer(0.1)), Cause.OPTIMIZER),
    "metric": Defect(
        lambda: compiled(dense(), metrics=[MeanOfBatches()]), Cause.METRIC, ragged=True
    ),
    "dropout": Defect(
        lambda: compiled(dense(norm=lambda: layers.Dropout(0.5))), Cause.RANDOM, "dropout"
    ),
    "flips": Defect(augmented(lambda: layers.RandomFlip()), Cause.RANDOM, "random_flip", IMAGES),
    "noise": Defect(
        augmented(lambda: layers.GaussianNoise(1.0)), Cause.RANDOM, "gaussian_noise", IMAGES
    ),
    "shifts": Defect(
        augmented(lambda: layers.RandomTranslation(0.3, 0.3)), Cause.RANDOM, "translation", IMAGES
    ),
    "NaN on one": Defect(lambda: compiled(dense(norm=NanOnOne)), Cause.NOT_FINITE, "nan_on_one"),
    "keras, ragged": Defect(
        lambda: compiled(dense()), Cause.EQUAL_WEIGHTS, ragged=True, repair=False
    ),
}
