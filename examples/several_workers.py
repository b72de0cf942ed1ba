# %% [markdown]
"""Several workers: the second of three programs.

What it shows
    `fit` under `MultiWorkerMirroredStrategy`, which crashes in Keras 3 as it is. Every worker is a
    process that runs this program; `syncbn launch` starts them, on this machine or on several, and
    tells each who the others are. Each also trains the same model alone, and says how far the
    weights of all workers are from those.

Run it (half a minute on two cores; needs scikit-learn)
    syncbn launch --workers 2 examples/several_workers.py
    syncbn launch --workers 2 --devices-per-worker 2 examples/several_workers.py
    python examples/several_workers.py          # one worker: the same program, nothing to start

What comes out
    [0] 2 replicas on 2 workers: accuracy 0.92…, Δ to one device 1e-11 or less
    [1] 2 replicas on 2 workers: the same

The others: `one_machine.py`, `custom_layer.py`.
"""

# %%
from __future__ import annotations

import argparse
import multiprocessing
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


# %% [markdown]
# ## Model and data
# The same on every worker: the same code, the same seed, the same arrays. Each worker trains on
# its part of every batch, so that the batch size stays that of the global batch.
# %%
def build_model() -> keras.Model:
    """A small convolutional network with two normalizations, compiled."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, use_bias=False),
            syncbn.SyncBatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(16, 3, use_bias=False),
            syncbn.SyncBatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.02, momentum=0.9), loss, metrics=["accuracy"])
    return model


def fit(model: keras.Model, epochs: int) -> float:
    """Train; the accuracy of the last epoch, on all workers the same."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1)
    history = model.fit(images, labels, batch_size=64, epochs=epochs, shuffle=False, verbose=0)
    return history.history["accuracy"][-1]


# %% [markdown]
# ## One device, for comparison
# In a process that belongs to no cluster, before the workers meet. In a worker's own process
# TensorFlow would place a model that is made outside of the scope on worker 0, for all at once.
# %%
def on_one_device(epochs: int) -> list[np.ndarray]:
    """The weights that one device comes to."""
    cluster = {"TF_CONFIG", "SYNCBN_DEVICES_PER_WORKER"} & set(os.environ)
    kept = {name: os.environ.pop(name) for name in cluster}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        weights = pool.apply(_alone, (epochs,))
    os.environ.update(kept)
    return weights


def _alone(epochs: int) -> list[np.ndarray]:
    model = build_model()
    fit(model, epochs)
    return model.get_weights()


# %% [markdown]
# ## The program of every worker
# `enable_multi_worker()` waits until all workers are there, names the one that is missing, and
# repairs what Keras's `fit` does wrong on several. In a program of your own it comes first.
# %%
def main() -> None:
    """Train with all workers, and compare with one device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    epochs = parser.parse_args().epochs
    reference = on_one_device(epochs)

    syncbn.enable_multi_worker()
    strategy: Any = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = build_model()
    accuracy = fit(model, epochs)
    pairs = zip(model.get_weights(), reference, strict=True)
    delta = max(float(np.abs(own - its).max()) for own, its in pairs)
    cluster = strategy.cluster_resolver.cluster_spec().as_dict()
    print(
        f"{strategy.num_replicas_in_sync} replicas on {len(cluster.get('worker', [0]))} workers: "
        f"accuracy {accuracy:.4f}, Δ to one device {delta:.0e}"
    )


if __name__ == "__main__":
    main()
