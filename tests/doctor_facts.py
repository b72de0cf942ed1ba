"""What a TensorFlow has and does, as JSON; Python 3.7 has to read this file.

    python tests/doctor_facts.py           # which layers there are, and what saving keeps
    python tests/doctor_facts.py fit       # as one of two workers, with TF_CONFIG: trains

It knows nothing of syncbn: `tests/doctor_versions.py` runs it in environments of their own.
"""

import json
import logging
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# This folder, in which `jax` and `torch` are tests.
del sys.path[0]


class Heard(logging.Handler):
    """Keeps what TensorFlow logs, which is how it says that something is deprecated."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def layers(tf):
    """Of tf.keras: which it has, which are deprecated, which come back from their configuration."""
    heard = Heard()
    tf.get_logger().addHandler(heard)
    normal = tf.keras.layers.BatchNormalization
    experimental = getattr(
        getattr(tf.keras.layers, "experimental", None), "SyncBatchNormalization", 0
    )
    found = {"argument": None, "experimental": None}
    try:
        layer = normal(synchronized=True)
    except (TypeError, ValueError):
        pass  # it does not know the argument
    else:
        copy = normal.from_config(layer.get_config())
        found["argument"] = {
            "kept": bool(getattr(copy, "synchronized", False)),
            "deprecated": False,
        }
    if experimental:
        del heard.lines[:]
        layer = experimental()
        copy = experimental.from_config(layer.get_config())
        found["experimental"] = {
            # Where it is a function that makes the other, it is that one's argument that counts.
            "kept": bool(getattr(copy, "synchronized", isinstance(copy, type(layer)))),
            "deprecated": any("deprecated" in line for line in heard.lines),
        }
    tf.get_logger().removeHandler(heard)
    return found


def fit(tf):
    """A short training under MultiWorkerMirroredStrategy, with numbers that need no learning."""
    import numpy as np

    strategy = getattr(tf.distribute, "MultiWorkerMirroredStrategy", None)
    strategy = (strategy or tf.distribute.experimental.MultiWorkerMirroredStrategy)()
    with strategy.scope():
        model = tf.keras.Sequential(
            [tf.keras.layers.Dense(2), tf.keras.layers.BatchNormalization()]
        )
        model.compile("sgd", "mse")
    x = np.random.RandomState(0).normal(size=(32, 3)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :2])).batch(8)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    history = model.fit(data.with_options(options), epochs=1, steps_per_epoch=2, verbose=0)
    return {"loss": float(history.history["loss"][-1])}


def main(arguments):
    import tensorflow as tf

    found = fit(tf) if arguments[:1] == ["fit"] else layers(tf)
    print(json.dumps(dict(found, tensorflow=tf.__version__)), flush=True)
    if "loss" in found:
        # Some versions abort while their servers are taken down, which is not what is asked about.
        time.sleep(1)
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
