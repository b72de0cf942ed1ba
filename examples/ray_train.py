"""Keras 3 on two workers of Ray Train: what Ray's own TensorflowTrainer cannot do alone.

    pip install 'syncbn[tensorflow,ray]' scikit-learn
    python examples/ray_train.py                    # or --backend jax, --backend torch
    python examples/ray_train.py --epochs 6         # the run of before goes on

On a cluster, set RAY_ADDRESS; without it a Ray of this machine alone is started, and ended.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def build_model():
    import keras

    import syncbn

    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, use_bias=False),
            syncbn.SyncBatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


COMPILED = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}


def train_loop(config):
    """What each worker runs."""
    import keras
    import numpy as np
    from sklearn.datasets import load_digits

    import syncbn
    from syncbn.integrations.ray import ReportCheckpoint, prepare

    prepare()
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8, 1).astype("float32")
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        # The same arrays on every worker: each trains on its part of every batch of 64.
        with tf.distribute.MultiWorkerMirroredStrategy().scope():
            model = build_model()
            model.compile(keras.optimizers.Adam(0.01), **COMPILED)
        data = {"x": x, "y": y, "batch_size": 64}
    else:
        # A worker's own part of the data, and of every batch.
        import ray.train

        context = ray.train.get_context()
        rank, workers = context.get_world_rank(), context.get_world_size()
        x, y = x[rank::workers], y[rank::workers]
        if backend == "jax":
            keras.distribution.set_distribution(
                keras.distribution.DataParallel(auto_shard_dataset=False)
            )
            data = {"x": syncbn.distribute_dataset(x, y, batch_size=64 // workers, shuffle=True)}
        else:
            rows = len(y) // 32 * 32  # as many batches on every process
            data = {"x": x[:rows], "y": y[:rows], "batch_size": 64 // workers}
        model = build_model()
        model.compile(keras.optimizers.Adam(0.01), **COMPILED)
        if backend == "torch":
            syncbn.average_gradients(model)
    model.fit(**data, epochs=config["epochs"], verbose=0, callbacks=[ReportCheckpoint()])
    weights = np.concatenate([np.ravel(w) for w in model.get_weights()])
    print(f"weights {weights.astype('float64').sum():.12f}", flush=True)


def trainer_of(backend):
    if backend == "tensorflow":
        from ray.train.tensorflow import TensorflowTrainer

        return TensorflowTrainer
    if backend == "jax":
        from ray.train.v2.jax import JaxTrainer

        return JaxTrainer
    from ray.train.torch import TorchTrainer

    return TorchTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"], default="tensorflow")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", type=Path, default=Path("ray-results"))
    arguments = parser.parse_args()

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    environment = {"KERAS_BACKEND": arguments.backend}
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        # Nothing of it is reached from elsewhere.
        ray.init(
            num_cpus=arguments.workers + 1, include_dashboard=False, _node_ip_address="127.0.0.1"
        )
    result = trainer_of(arguments.backend)(
        train_loop,
        train_loop_config={"epochs": arguments.epochs},
        scaling_config=ScalingConfig(num_workers=arguments.workers),
        run_config=RunConfig(
            name="digits",
            storage_path=str(arguments.storage.resolve()),
            failure_config=FailureConfig(max_failures=2),
            worker_runtime_env={"env_vars": environment},
        ),
    ).fit()
    metrics = result.metrics
    print(
        f"epoch {metrics['epoch']}: accuracy {metrics['accuracy']:.3f}, loss {metrics['loss']:.4f}"
    )
    print(f"checkpoint: {sorted(p.name for p in Path(result.checkpoint.path).iterdir())}")
    ray.shutdown()


if __name__ == "__main__":
    main()
