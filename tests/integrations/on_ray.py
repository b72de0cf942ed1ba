"""A program that trains by Ray's TensorflowTrainer on two workers; `run` in a process of its own.

Ray listens on the loopback of a network that only this process has, where it can be made.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path

ROWS, BATCH, WORKERS = 42, 12, 2


def data():
    import numpy as np

    rng = np.random.default_rng(0)
    x = 3 + rng.normal(size=(ROWS, 4)) * np.linspace(1, 5, ROWS)[:, None]
    return x, x[:, :1] * 0.1


def model_of():
    import keras

    import syncbn

    keras.utils.set_random_seed(0)
    keras.config.set_floatx("float64")
    layers = [keras.layers.Dense(8, use_bias=False), syncbn.SyncBatchNormalization(momentum=0.5)]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    return model


def save(model, path):
    import numpy as np

    np.savez(path, *model.get_weights())


def loop(config):
    """On a worker: trains on the same arrays as all, and leaves its weights."""
    import keras
    import ray.train

    from syncbn.integrations.ray import ReportCheckpoint, prepare

    if config["prepared"]:
        prepare()
    import tensorflow as tf

    rank = ray.train.get_context().get_world_rank()

    class Dying(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):  # noqa: ARG002
            mark = Path(config["folder"]) / "died"
            if config["dies"] and epoch == 1 and rank == 1 and not mark.exists():
                mark.touch()
                time.sleep(8)  # Ray asks its workers for reports every now and then
                os.kill(os.getpid(), signal.SIGKILL)

    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        model = model_of()
    x, y = data()
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=config["epochs"],
        verbose=0,
        shuffle=config["shuffle"],
        callbacks=[Dying(), ReportCheckpoint(every=config["every"])],
    )
    save(model, Path(config["folder"]) / f"{config['saved']}-{rank}.npz")
    (Path(config["folder"]) / f"{config['saved']}-{rank}.json").write_text(
        json.dumps(
            {
                "epochs": history.epoch,
                "keras": tf.keras.__version__,
                "legacy": os.environ.get("TF_USE_LEGACY_KERAS"),
            }
        )
    )


def fit(folder, name, **config):
    """A run of Ray; the metrics that it reported last."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    settings = {"folder": str(folder), "saved": name, "prepared": True, "dies": False}
    settings |= {"every": 1, "shuffle": True}
    result = TensorflowTrainer(
        loop,
        train_loop_config={**settings, **config},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder / "storage"),
            failure_config=FailureConfig(max_failures=int(config.get("dies", False))),
        ),
    ).fit()
    return result.metrics


def main():
    from syncbn.launch import isolation

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", help="JSON: a list of runs, each the keywords of fit()")
    arguments = parser.parse_args()
    if isolation.why_not() is None:
        isolation.enter()
    import ray

    # Its sockets' paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as short:
        ray.init(
            num_cpus=WORKERS + 1,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=short,
            object_store_memory=80 * 2**20,
        )
        metrics = []
        for run in json.loads(arguments.runs):
            try:
                metrics.append(fit(arguments.folder, **run))
            except ray.train.TrainingFailedError as error:
                metrics.append({"error": str(error)})
        ray.shutdown()
    (arguments.folder / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
