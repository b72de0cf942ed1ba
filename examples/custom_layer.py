# %% [markdown]
"""A layer and a training loop of your own: the third of three programs.

What it shows
    `SyncBatchNormalization` inside a residual block that is a class of your own, trained by a loop
    of your own with `strategy.run`, without `fit`. Three rules make such a loop that of one
    device: the loss is divided by the size of the *global* batch, gradients are summed over the
    replicas (Keras's optimizers do that), and the layer is called with `training=True`.

Run it (a quarter of a minute on two cores; needs scikit-learn)
    python examples/custom_layer.py
    python examples/custom_layer.py --replicas 4

What comes out
    The loss on replicas and on one device, which agree to all digits shown, and how far the
    weights are from each other: 1e-11 or less.

The others: `one_machine.py`, `several_workers.py`.
"""

# %%
from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import syncbn

keras.config.set_floatx("float64")  # for the comparison alone: rounding is small in it
BATCH = 36  # the global batch; does not divide by 8 replicas, nor has to


# %% [markdown]
# ## A layer that contains the layer
# As with any layer of Keras: made in the constructor, built in `build`, and told about
# `training`. Registered, so that a saved model opens again.
# %%
@keras.saving.register_keras_serializable("examples")
class Residual(keras.layers.Layer):
    """`relu(x + norm(conv(relu(norm(conv(x))))))`; shapes (N, H, W, channels), kept."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels
        options = {"padding": "same", "use_bias": False}
        self.convolutions = [keras.layers.Conv2D(channels, 3, **options) for _ in range(2)]
        self.norms = [
            syncbn.SyncBatchNormalization(activation="relu"),  # relu inside: a tensor less kept
            syncbn.SyncBatchNormalization(gamma_initializer="zeros"),  # begins as the identity
        ]

    def build(self, input_shape: Any) -> None:
        """Make the weights of the layers within."""
        for layer in (*self.convolutions, *self.norms):
            layer.build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The block's outputs."""
        x = inputs
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x), training=training)
        return keras.ops.relu(inputs + x)

    def get_config(self) -> dict[str, Any]:
        """What makes the same layer again."""
        return {**super().get_config(), "channels": self.channels}


def build_model() -> keras.Model:
    """A network of two such blocks."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            syncbn.SyncBatchNormalization(activation="relu"),
            Residual(8),
            Residual(8),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


# %% [markdown]
# ## The loop
# `run` calls `step` on each replica with its part of the batch. The losses of its examples are
# summed and divided by the number of *all* examples: an average over the replica's own would be
# wrong as soon as parts differ in size, as they do in the last batch.
# %%
def train(strategy: Any, steps: int) -> tuple[keras.Model, list[float]]:
    """The model after so many steps, and the loss of each."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1)[: steps * BATCH - 5]  # a ragged last batch
    data = tf.data.Dataset.from_tensor_slices((images, labels[: len(images)])).batch(BATCH)

    with strategy.scope():
        model = build_model()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)
    losses_of = keras.losses.sparse_categorical_crossentropy

    def step(x: Any, y: Any, examples: Any) -> Any:
        with tf.GradientTape() as tape:
            losses = losses_of(y, model(x, training=True), from_logits=True)
            loss = tf.reduce_sum(losses) / tf.cast(examples, losses.dtype)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function(reduce_retracing=True)
    def global_step(x: Any, y: Any, examples: Any) -> Any:
        losses = strategy.run(step, args=(x, y, examples))
        return strategy.reduce("sum", losses, axis=None)

    sizes = [min(BATCH, len(images) - start) for start in range(0, len(images), BATCH)]
    batches = strategy.experimental_distribute_dataset(data)
    losses = [
        float(global_step(x, y, tf.constant(size)))
        for size, (x, y) in zip(sizes, batches, strict=True)
    ]
    return model, losses


# %% [markdown]
# ## Replicas against one device
# %%
def main() -> None:
    """Train on both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * arguments.replicas
    )
    names = [f"CPU:{index}" for index in range(arguments.replicas)]
    one_device, expected = train(tf.distribute.get_strategy(), arguments.steps)
    replicas, losses = train(tf.distribute.MirroredStrategy(names), arguments.steps)
    for name, values in (("one device", expected), (f"{len(names)} replicas", losses)):
        print(f"{name}: loss {values[0]:.10f} at first, {values[-1]:.10f} at last")
    pairs = zip(replicas.get_weights(), one_device.get_weights(), strict=True)
    delta = max(float(np.abs(own - its).max()) for own, its in pairs)
    print(f"largest difference of any weight: {delta:.0e}")


if __name__ == "__main__":
    main()
