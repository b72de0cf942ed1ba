"""One of several processes that train, on any of Keras's backends, or the only one.

`python -m tests.multiprocess.workers.trained FOLDER [HOW]`, which leaves the weights in FOLDER.
With HOW, "dies" or "requeued", the second process, in the second epoch of its first life, kills
itself or lets Slurm start the job anew; all resume from a backup.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np

import syncbn

ROWS, BATCHES, EPOCHS = 12, 4, 3
RANK = int(os.environ.get("RANK", "0"))
SIZE = int(os.environ.get("WORLD_SIZE", "1"))
BACKEND = keras.backend.backend()


def data():
    """Examples in an order in which neighbours are alike: each process has batches of its own."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCHES, ROWS, 5)) + np.linspace(-2, 2, ROWS).reshape(1, -1, 1)
    return x.astype("float32"), rng.normal(size=(BATCHES, ROWS, 2)).astype("float32")


def make_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8, use_bias=False),
            syncbn.SyncBatchNormalization(momentum=0.9),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(2),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def on_tensorflow(x, y, callbacks):
    import tensorflow as tf

    syncbn.enable_multi_worker()
    strategy = (
        tf.distribute.MultiWorkerMirroredStrategy() if SIZE > 1 else tf.distribute.get_strategy()
    )
    with strategy.scope():
        model = make_model()
    whole = [array.reshape(-1, array.shape[-1]) for array in (x, y)]
    model.fit(*whole, ROWS, EPOCHS, verbose=0, shuffle=False, callbacks=callbacks)
    return model


def on_processes(x, y, callbacks):
    """Each process is given its own part of every batch."""
    if SIZE > 1 and BACKEND == "jax":
        keras.distribution.initialize()
        parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
        keras.distribution.set_distribution(parallel)
    model = None
    if SIZE > 1 and BACKEND == "torch":
        from torch import distributed

        distributed.init_process_group("gloo")
        model = make_model()
        syncbn.average_gradients(model)
    model = model or make_model()
    own = ROWS // SIZE
    part = slice(RANK * own, (RANK + 1) * own)
    parts = [array[:, part].reshape(-1, array.shape[-1]) for array in (x, y)]
    model.fit(*parts, own, EPOCHS, verbose=0, shuffle=False, callbacks=callbacks)
    return model


class Ends(keras.callbacks.Callback):
    """In the second epoch: this process by its own hand, or the job by Slurm's."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002 - as Keras calls it
        if epoch != 1:
            return
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        time.sleep(60)


def main(folder: Path, how: str) -> None:
    callbacks = []
    restarts = int(os.environ.get("SYNCBN_RESTARTS", "0"))
    if how:
        callbacks.append(keras.callbacks.BackupAndRestore(str(folder / "backup")))
        if RANK == 1 and restarts == 0 and "SLURM_RESTART_COUNT" not in os.environ:
            callbacks.append(Ends(how))
    train = on_tensorflow if BACKEND == "tensorflow" else on_processes
    model = train(*data(), callbacks)
    arrays = [np.asarray(keras.ops.convert_to_numpy(weight)) for weight in model.weights]
    np.savez(folder / f"{RANK}-of-{SIZE}.npz", *arrays)
    print(json.dumps({"trained": RANK, "of": SIZE, "restarts": restarts, "on": BACKEND}))
    if SIZE > 1 and BACKEND == "torch":
        from torch import distributed

        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "".join(sys.argv[2:]))
