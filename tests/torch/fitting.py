"""Trains by Keras's `fit` as one process of several: `python -m tests.torch.fitting FOLDER HOW…`.

Or as the only one, on all the data. Leaves what came out in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from torch import distributed

import syncbn

# Rows of each batch, by process: uneven, and in the last of each epoch the second has none.
BATCHES = [(33, 32), (20, 45), (9, 0)]
# Of Keras's own layer, which makes NaN of nothing.
NO_EMPTY = [(33, 32), (20, 45), (8, 1)]


def data():
    """All batches, whole."""
    rng = np.random.default_rng(0)
    rows = sum(map(sum, BATCHES))
    x = rng.normal(size=(rows, 6)).astype("float32") * 2 + 1
    y = (x[:, :1] * x[:, 1:2] > 0).astype("float32")
    return x, y


def batches(rank, how):
    """Those of one process; of all together with rank None."""
    x, y = data()
    start = 0
    for sizes in NO_EMPTY if how in ("local", "apart") else BATCHES:
        parts = np.cumsum([start, *sizes])
        own = slice(*parts[rank : rank + 2]) if rank is not None else slice(parts[0], parts[-1])
        start = parts[-1]
        yield x[own], y[own]


def make_model(norm, jit_compile=False):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, kernel_regularizer="l2"),
            norm(momentum=0.9),
            keras.layers.Activation("relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(**compiled("compiled" if jit_compile else "eager"))
    return model


def compiled(how):
    return {
        "optimizer": keras.optimizers.SGD(0.1, momentum=0.9),
        "loss": "binary_crossentropy",
        # The last gives back a view of its variable.
        "metrics": ["accuracy", keras.metrics.TruePositives(name="hits")],
        "jit_compile": how == "compiled",
    }


def fewer(rank):
    """The second process has a batch less than the first."""
    model = make_model(syncbn.SyncBatchNormalization)
    syncbn.average_gradients(model)
    own = [part for part in batches(rank, "fewer") if len(part[0])]
    try:
        model.fit((part for part in own), epochs=1, verbose=0)
    except syncbn.WorkerError as error:
        return {"error": str(error)}
    return {"error": ""}


def outside():
    """The group is of the first process alone."""
    model = make_model(syncbn.SyncBatchNormalization)
    group = distributed.new_group([0])
    try:
        syncbn.average_gradients(model, group)
    except syncbn.NotSynchronizableError as error:
        return {"error": str(error)}
    return {"error": ""}


def run(rank, how):
    """Three epochs; weights, logs, and what `evaluate` says. Or the error that there must be."""
    if how == "fewer":
        return fewer(rank)
    if how == "outside":
        return outside()
    norm = keras.layers.BatchNormalization if how == "local" else syncbn.SyncBatchNormalization
    model = make_model(norm, jit_compile=how == "compiled")
    if rank is not None:
        if rank == 1:
            model.set_weights([weight + 1 for weight in model.get_weights()])
        if how != "apart":
            syncbn.average_gradients(model)
            syncbn.average_gradients(model)  # once more is once
            model.compile(**compiled(how))
            syncbn.average_gradients(model)  # and after it is compiled anew

    def epochs():
        while True:
            yield from batches(rank, how)

    history = model.fit(epochs(), steps_per_epoch=len(BATCHES), epochs=3, verbose=0).history
    scores = model.evaluate(batches(rank, how), verbose=0)
    # Dropped before the second: a metric that was summed once more would be another.
    again = model.evaluate(batches(rank, how), verbose=0)
    weights = [weight.astype(float).tolist() for weight in model.get_weights()]
    return {"history": history, "scores": [scores, again], "weights": weights}


def main(folder, hows):
    rank = None
    if "TF_CONFIG" in os.environ:
        config = json.loads(os.environ["TF_CONFIG"])
        rank, addresses = config["task"]["index"], config["cluster"]["worker"]
        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo", init_method=f"tcp://{addresses[0]}", rank=rank, world_size=len(addresses)
        )
    for how in hows:
        Path(folder, f"{how}-{rank}.json").write_text(json.dumps(run(rank, how)))
    if rank is not None:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
