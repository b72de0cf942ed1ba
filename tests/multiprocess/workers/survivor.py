"""A worker of a training that is killed at chosen steps, and resumed by the launcher."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import syncbn

RANK = int(os.environ.get("RANK", "0"))  # the tests import the numbers below
EPOCHS, BATCH, EXAMPLES = 4, 16, 150  # the last batch of an epoch is ragged
STEPS = -(-EXAMPLES // BATCH)  # of an epoch


class Killed(keras.callbacks.Callback):
    """At certain steps, counted over all epochs, certain workers end by SIGKILL, each once."""

    def __init__(self, folder: Path, kills: list[tuple[int, list[int]]]) -> None:
        super().__init__()
        self.folder = folder
        self.kills = dict(kills)
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        step = self.epoch * STEPS + batch
        done = self.folder / f"killed-{step}-{RANK}"
        if RANK in self.kills.get(step, ()) and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kills: list[tuple[int, list[int]]]) -> None:
    syncbn.enable_multi_worker()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(3)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(EXAMPLES, 6)).astype("float32")
    y = generator.integers(3, size=EXAMPLES)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, use_bias=False),
                syncbn.SyncBatchNormalization(),
                keras.layers.ReLU(),
                keras.layers.Dropout(0.3),
                keras.layers.Dense(3),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(clipnorm=1.0), loss, metrics=["accuracy"])
    backup = keras.callbacks.BackupAndRestore(folder / "backup")
    history = model.fit(
        x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=[backup, Killed(folder, kills)]
    )
    print("epochs", len(history.history["loss"]))
    if RANK == 0:
        variables = [*model.variables, *model.optimizer.variables]
        np.savez(folder / "final.npz", *[np.asarray(v.numpy()) for v in variables])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
