"""Trains as chief or worker and evaluates as evaluator, whichever the operator says; on torch, too.

    syncbn launch --workers 2 examples/kubernetes/train.py --folder /tmp/digits    # here
    kubectl apply -f examples/kubernetes/tfjob.yaml                                # there

All see the same folder: the chief's checkpoints are in it, and what the evaluator says of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

LAST = "trained"  # of this name is the file that ends the evaluator


def role() -> str:
    """What TF_CONFIG calls this process: chief, worker or evaluator."""
    return json.loads(os.environ.get("TF_CONFIG") or "{}").get("task", {}).get("type", "worker")


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).reshape(-1, 8, 8, 1).astype("float32"), y


def build_model():
    import keras

    import syncbn

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, use_bias=False),
            # Epochs have 25 steps: by Keras's 0.99 the moving statistics would trail behind.
            syncbn.SyncBatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def on_tensorflow():
    """The model, and this worker's data: all of it, of which each trains on its part."""
    import tensorflow as tf

    import syncbn

    syncbn.enable_multi_worker()
    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        model = build_model()
    x, y = digits()
    return model, (x[:1500], y[:1500]), 0 if role() == "chief" else int(task_index())


def task_index() -> int:
    return json.loads(os.environ.get("TF_CONFIG") or "{}").get("task", {}).get("index", 0)


def on_torch():
    """The model, and this process's own part of the data; torchrun has set the environment."""
    from torch import distributed

    import syncbn

    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    model = build_model()
    syncbn.average_gradients(model)
    x, y = digits()
    rows = 1500 // processes * processes
    return model, (x[rank:rows:processes], y[rank:rows:processes]), rank


def train(folder: Path, epochs: int) -> None:
    import keras
    import numpy as np

    import syncbn

    on_torch_now = keras.backend.backend() == "torch"
    model, (x, y), rank = on_torch() if on_torch_now else on_tensorflow()
    callbacks = [keras.callbacks.BackupAndRestore(folder / f"backup-{rank if on_torch_now else 0}")]
    if rank == 0 or not on_torch_now:  # on TensorFlow every worker has it, and the chief writes
        callbacks.append(syncbn.PortableCheckpoint(folder / "epoch-{epoch:03d}.keras"))
    model.fit(x, y, batch_size=60, epochs=epochs, verbose=0, callbacks=callbacks)
    total = np.concatenate([np.ravel(w) for w in model.get_weights()]).astype("float64").sum()
    print(f"{role()} {rank}: the sum of the weights is {total:.12f}", flush=True)
    if rank == 0:
        (folder / LAST).touch()


def evaluate(folder: Path, patience: float) -> None:
    """Each checkpoint once, as it comes; the evaluator is none of the cluster."""
    os.environ.pop("TF_CONFIG")
    import keras

    x, y = digits()
    seen: set[Path] = set()
    waited = time.monotonic()
    while True:
        ended = (folder / LAST).exists()
        files = sorted(folder.glob("epoch-*.keras"))
        # The newest may still be written to.
        for path in files if ended else files[:-1]:
            if path not in seen:
                _, accuracy = keras.saving.load_model(path).evaluate(x[1500:], y[1500:], verbose=0)
                print(f"{path.stem}: accuracy {accuracy:.3f}", flush=True)
                seen.add(path)
                waited = time.monotonic()
        if ended:
            return
        if time.monotonic() - waited > patience:
            raise SystemExit(f"no checkpoint in {folder} for {patience:g} s, nor a file {LAST!r}")
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="which all processes see")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--patience", type=float, default=600, help="of the evaluator, in seconds")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if role() == "evaluator":
        evaluate(arguments.folder, arguments.patience)
    else:
        train(arguments.folder, arguments.epochs)


if __name__ == "__main__":
    main()
