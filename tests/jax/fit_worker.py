"""One of several processes that train a model: `fit_worker.py FILE ADDRESS COUNT INDEX`."""

from __future__ import annotations

import os
import sys

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax")

BATCH, STEPS = 16, 4


def data():
    """Examples in an order in which neighbours are alike: each process has batches of its own."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, BATCH, 6, 6, 3)).astype("float32")
    x += np.linspace(-2, 2, BATCH, dtype="float32").reshape(1, -1, 1, 1, 1)
    return x, rng.normal(size=(STEPS, BATCH, 2)).astype("float32")


def trained(x, y, batch, layer_class=None, **options):
    """The weights of a small network after two epochs."""
    import keras

    import syncbn

    layer_class = layer_class or syncbn.SyncBatchNormalization
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Conv2D(4, 3),
            layer_class(momentum=0.9, name="norm"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            layer_class(momentum=0.9),
            keras.layers.Dense(2),
        ]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse", **options)
    model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0)
    return [np.asarray(weight) for weight in model.get_weights()]


def main() -> None:
    file, address, count, index = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    import keras

    keras.distribution.initialize(address, count, index)
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    own = BATCH // count
    part = slice(index * own, (index + 1) * own)
    x, y = (array[:, part].reshape(-1, *array.shape[2:]) for array in data())
    np.savez(file, *trained(x, y, own))


if __name__ == "__main__":
    main()
