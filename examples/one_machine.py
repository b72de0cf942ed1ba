# %% [markdown]
"""One machine, several devices: the first of three programs.

What it shows
    A widely copied answer says that `BatchNormalization` under a `tf.distribute` strategy is
    synchronized by itself. It is not. This program trains a small network on the handwritten
    digits of scikit-learn three times from the same weights, on the same batches: on one device,
    on several replicas with Keras's layer, and on several replicas with
    `syncbn.SyncBatchNormalization`. It prints how far the weights end from those of one device.

Run it (half a minute on two cores; needs scikit-learn)
    python examples/one_machine.py
    python examples/one_machine.py --replicas 4

What comes out
    BatchNormalization: weights off by 1e-2 or more, moving means that differ by replica (and a
    warning that says so); SyncBatchNormalization: 1e-11 or less, the same bits on every replica.

The others: `several_workers.py`, `custom_layer.py`.
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

# %% [markdown]
# In float64 rounding is small: what remains of a difference is a difference of the method. For
# training of your own leave this line out.
# %%
keras.config.set_floatx("float64")


# %% [markdown]
# ## Devices
# Before TensorFlow has started. Two GPUs are two replicas; without them the CPU is split in
# virtual devices, which is slower than one but takes the same steps.
# %%
def devices(replicas: int) -> list[str]:
    """The names of so many devices: GPUs if there are enough, else virtual CPUs."""
    if len(tf.config.list_physical_devices("GPU")) >= replicas:
        return [f"GPU:{index}" for index in range(replicas)]
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
    )
    return [f"CPU:{index}" for index in range(replicas)]


# %% [markdown]
# ## The model
# An ordinary one of Keras. A convolution or a dense layer in front of batch normalization needs
# no bias: the normalization takes it away.
# %%
def build_model(norm: type[keras.layers.Layer]) -> keras.Model:
    """A perceptron with two normalizations, compiled; in the current strategy's scope."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, use_bias=False),
            norm(name="first"),
            keras.layers.ReLU(),
            keras.layers.Dense(32, use_bias=False),
            norm(name="second"),
            keras.layers.ReLU(),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, metrics=["accuracy"])
    return model


# %% [markdown]
# ## Training
# `batch_size` is that of the *global* batch: of 32 examples two replicas take 16 each. The last
# batch of an epoch has 5, which is 3 and 2; `enable_multi_worker()` is what makes `fit` count
# them rightly.
# %%
def trained(strategy: Any, norm: type[keras.layers.Layer]) -> tuple[keras.Model, float]:
    """The model after two epochs, and its accuracy in the last."""
    images, labels = load_digits(return_X_y=True)
    with strategy.scope():
        model = build_model(norm)
    history = model.fit(images / 16, labels, batch_size=32, epochs=2, shuffle=False, verbose=0)
    return model, history.history["accuracy"][-1]


def spread(strategy: Any, variable: Any) -> float:
    """The largest difference between the replicas' copies of a variable."""
    copies = [np.asarray(c) for c in strategy.experimental_local_results(variable.value)]
    return float(max(np.abs(copy - copies[0]).max() for copy in copies))


# %% [markdown]
# ## All three
# %%
def main() -> None:
    """Train on one device and on replicas, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2)
    arguments = parser.parse_args()

    names = devices(arguments.replicas)
    syncbn.enable_multi_worker()
    strategy = tf.distribute.MirroredStrategy(names)
    reference, accuracy = trained(tf.distribute.get_strategy(), keras.layers.BatchNormalization)
    print(f"one device: accuracy {accuracy:.4f}")
    for norm in (keras.layers.BatchNormalization, syncbn.SyncBatchNormalization):
        model, accuracy = trained(strategy, norm)
        pairs = zip(model.trainable_variables, reference.trainable_variables, strict=True)
        delta = max(float(np.abs(own.numpy() - its.numpy()).max()) for own, its in pairs)
        apart = spread(strategy, model.get_layer("first").moving_mean)
        print(
            f"{norm.__name__:23} on {len(names)} replicas: accuracy {accuracy:.4f}, "
            f"Δ to one device {delta:.0e}, moving means apart by {apart:.0e}"
        )


if __name__ == "__main__":
    main()
