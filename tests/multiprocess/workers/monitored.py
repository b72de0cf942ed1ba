"""A worker whose training is watched; writes what it logged as JSON."""

import json
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import syncbn
from syncbn.monitoring import SyncMonitor


def main() -> None:
    folder = Path(sys.argv[1])
    syncbn.enable_multi_worker()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        inputs = keras.Input((5,))
        layers = [
            syncbn.SyncBatchNormalization(name="ours")(inputs),
            keras.layers.BatchNormalization(name="plain")(inputs),
        ]
        outputs = keras.layers.Dense(1)(keras.layers.Concatenate()(layers))
        model = keras.Model(inputs, outputs)
        model.compile("sgd", "mse")
    x = np.load(folder / "x.npy")
    monitor = SyncMonitor(folder / "logs", interval=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(
            x, x[:, :1], batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[monitor]
        )
    worker = strategy.cluster_resolver.task_id
    found = {
        "history": {k: v for k, v in history.history.items() if "sync" in k},
        "said": [str(one.message) for one in caught if "SyncMonitor" in str(one.message)],
        "report": str(monitor.report()),
    }
    (folder / f"worker{worker}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
