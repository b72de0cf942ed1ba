"""What users make of losses and metrics themselves: losses of losses, GANs, logs of their own.

Parts of 67 examples, as 34 and 33 and as 2 and 1: of 64 + 1 the last batch is on one replica, which
hides a division by the number of replicas.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

import syncbn
from tests.scenarios.models import compile_model, dense_model, fit, normal, set_weights, targets
from tests.scenarios.scenario import scenario
from tests.scenarios.world import World

_SQUARED = keras.losses.MeanSquaredError()
_ABSOLUTE = keras.losses.MeanAbsoluteError()
SIZE = 67


def both(y: Any, predicted: Any) -> Any:
    return _SQUARED(y, predicted) + 0.5 * _ABSOLUTE(y, predicted)


class Both(keras.losses.Loss):
    def call(self, y: Any, predicted: Any) -> Any:
        return both(y, predicted)


for _name, _make in {"function": lambda: both, "class": Both}.items():

    @scenario(
        name=f"loss_of_losses[{_name}]",
        covers=["a loss made of Loss objects"],
        repairs=["loss"],
        core=("one", "mirrored2") if _name == "function" else (),
    )
    def loss_of_losses(world: World, make: Any = _make) -> Any:
        model = dense_model(world, loss=make(), metrics=lambda: [both, "mae"])
        return fit(model, normal(SIZE, 6), targets(SIZE))


def mean_of_batch(y: Any, predicted: Any) -> Any:
    return ops.mean((y - predicted) ** 2)


@scenario(covers=["a loss and a metric of one number a batch", "an empty replica"])
def one_number_a_batch(world: World) -> Any:
    model = dense_model(world, loss=mean_of_batch, metrics=lambda: [mean_of_batch])
    x, y = normal(65, 6), targets(65)
    return fit(model, x, y, validation_data=(x[:33], y[:33]))


@scenario(covers=["a loss within a layer"])
def endpoint_layer(world: World) -> Any:
    class Endpoint(keras.layers.Layer):
        def call(self, predicted: Any, y: Any) -> Any:
            self.add_loss(_SQUARED(y, predicted))
            return predicted

    with world.scope():
        x, y = keras.Input((6,), name="x"), keras.Input((2,), name="y")
        hidden = syncbn.SyncBatchNormalization()(keras.layers.Dense(5, use_bias=False)(x))
        model = keras.Model({"x": x, "y": y}, Endpoint()(keras.layers.Dense(2)(hidden), y))
        set_weights(model)
        model.compile(keras.optimizers.SGD(0.1))
    return fit(model, {"x": normal(SIZE, 6), "y": targets(SIZE)})


class ComputedLoss(keras.Model):
    """As the docstring of Keras's `compute_loss` does it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tracker = keras.metrics.Mean(name="loss")

    def compute_loss(
        self,
        x: Any = None,  # noqa: ARG002 - Keras's
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,  # noqa: ARG002
        training: bool = True,  # noqa: ARG002
    ) -> Any:
        loss = _SQUARED(y, y_pred)
        loss += 0.1 * _ABSOLUTE(y, y_pred)
        self.tracker.update_state(loss)
        return loss

    @property
    def metrics(self) -> list[Any]:
        return [self.tracker]


@scenario(covers=["compute_loss of one's own, with a tracker"])
def own_compute_loss(world: World) -> Any:
    with world.scope():
        inputs = keras.Input((6,))
        model = ComputedLoss(inputs, keras.layers.Dense(2)(inputs))
        set_weights(model)
        model.compile(keras.optimizers.SGD(0.1))
    return fit(model, normal(SIZE, 6), targets(SIZE))


class OwnLogs(keras.Model):
    """Logs under names of its own, nested, and sums of losses."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.error = keras.metrics.MeanAbsoluteError(name="error")

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            first, second = _SQUARED(y, predicted), _ABSOLUTE(y, predicted)
            total = first + 0.5 * second
        self.optimizer.apply(tape.gradient(total, self.trainable_variables))
        self.error.update_state(y, predicted)
        return {"parts": {"first": first, "second": second}, "total": total} | {
            "renamed": self.error.result()
        }


@scenario(covers=["logs of one's own: nested, renamed, sums of losses"])
def own_logs(world: World) -> Any:
    logged: list[Any] = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            values = [logs[name] for name in ("total", "first", "second", "renamed")]
            logged.append([float(value) for value in values])

    with world.scope():
        inputs = keras.Input((6,))
        model = OwnLogs(inputs, keras.layers.Dense(2)(inputs))
        set_weights(model)
        compile_model(model)
        model.optimizer.build(model.trainable_variables)
    model.fit(
        normal(SIZE, 6), targets(SIZE), batch_size=32, shuffle=False, verbose=0, callbacks=[Keep()]
    )
    return {"logged": logged, "kernel": model.get_weights()[0]}


class Adversarial(keras.Model):
    """Two models, two losses, two optimizers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.generator = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6)])
        self.critic = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
        self.loss_of = keras.losses.BinaryCrossentropy(from_logits=True)

    def compile(self, **options: Any) -> None:
        super().compile(**options)
        self.optimizers = [keras.optimizers.Adam(0.01, clipnorm=0.5) for _ in range(2)]
        for optimizer, model in zip(self.optimizers, (self.critic, self.generator), strict=True):
            # On several replicas before the first step: see docs/how-to/multi-worker.md.
            optimizer.build(model.trainable_variables)

    def train_step(self, data: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            made = self.generator(data, training=True)
            real, fake = self.critic(data), self.critic(made)
            of_critic = self.loss_of(tf.ones_like(real), real)
            of_critic += self.loss_of(tf.zeros_like(fake), fake)
            of_generator = self.loss_of(tf.ones_like(fake), fake)
        losses = (of_critic, of_generator)
        models = (self.critic, self.generator)
        for loss, model, optimizer in zip(losses, models, self.optimizers, strict=True):
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
        return {"critic": of_critic, "generator": of_generator}


@scenario(covers=["two optimizers, two losses, a persistent tape"], tolerance=2e-4)
def adversarial(world: World) -> Any:
    with world.scope():
        model = Adversarial()
        set_weights(model)
        model.compile()
    return fit(model, normal(SIZE, 6), batch_size=32)


@scenario(covers=["generators that yield None for weights"], repairs=["inputs"])
def no_weights(world: World) -> Any:
    def batches() -> Any:
        for index in range(3):
            yield normal(15, 6, seed=index), targets(15, seed=index), None

    return fit(dense_model(world), batches(), epochs=1)
