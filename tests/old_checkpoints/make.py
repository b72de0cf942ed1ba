"""Makes the fixtures of old checkpoints, by the TensorFlow that runs it.

    python tests/old_checkpoints/make.py tests/old_checkpoints    # writes <version>.tar.xz there

Each version in an environment of its own. As they were made: Python 3.8 with tensorflow-cpu==2.2.3
protobuf<3.21 numpy<1.19 h5py<3; 2.5.3 and 2.8.4 with protobuf<3.21; 2.11.1, 2.12.1, 2.13.1; Python
3.11 with 2.14.1 and 2.15.1; and TF_USE_LEGACY_KERAS=1 with tf_keras beside Keras 3. Python 3.8 has
to read this file.

In each archive: files of every format, named by model and format, and expected.npz with the inputs,
the outputs of the old framework in inference, its versions and what it refused to save. Left out is
saved_model.pb of a SavedModel, its graph, which is large and never read.
"""

import os
import platform
import sys
import tarfile
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import models
import numpy as np
import tensorflow as tf

OLD = tf.keras.layers.experimental.SyncBatchNormalization
LEGACY = bool(os.environ.get("TF_USE_LEGACY_KERAS"))
TENSORFLOW = tuple(int(part) for part in tf.__version__.split(".")[:2])
HAS_FLAG = LEGACY or TENSORFLOW >= (2, 12)  # `synchronized=True`, and the format .keras


def flagged():
    return tf.keras.layers.BatchNormalization(synchronized=True)


def version():
    """The Keras that saves: of TensorFlow's own number up to 2.15, then tf_keras's."""
    return f"tf_keras-{__import__('tf_keras').__version__}" if LEGACY else f"tf-{tf.__version__}"


def made(kind):
    """A trained model, so that the optimizer has slots, with names that a session has counted."""
    norm = flagged if kind == "flag" else OLD
    for _ in range(2):
        norm(), tf.keras.layers.Conv2D(1, 1), tf.keras.layers.Dense(1)
    model, parts = models.MODELS[kind](tf.keras, norm)
    model.compile(tf.keras.optimizers.SGD(0.1, momentum=0.5), "mse", metrics=["mae"])
    x = models.inputs()
    model.train_on_batch(x, np.zeros((len(x), 2), "float32"))
    models.fill(parts)
    return model


def savers(model):
    """Every way of saving: what the file is called, and what writes it."""
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    ways = {
        "whole.h5": lambda to: model.save(to, save_format="h5"),
        "weights_only.h5": lambda to: model.save_weights(to, save_format="h5"),
        "model.weights.h5": lambda to: model.save_weights(to),
        "weights.ckpt": lambda to: model.save_weights(to, save_format="tf"),
        "train.ckpt": lambda to: checkpoint.save(to),
        "saved_model": lambda to: model.save(to, save_format="tf"),
    }
    if HAS_FLAG:
        ways["model.keras"] = lambda to: model.save(to)
    if TENSORFLOW == (2, 12):
        # It writes HDF5 into a file of that name, unless it is told.
        ways["told.keras"] = lambda to: model.save(to, save_format="keras_v3")
    return ways


def write(folder):
    """All files of this version."""
    outputs, refused = {}, []
    for kind in models.MODELS:
        if kind == "flag" and not HAS_FLAG:
            continue
        model = made(kind)
        for name, save in savers(model).items():
            try:
                save(str(folder / f"{kind}_{name}"))
            except (NotImplementedError, ValueError) as error:
                refused.append(f"{kind}_{name}")
                print("refused", kind, name, error)
        outputs[kind] = model(models.inputs(), training=False).numpy()
    np.savez_compressed(
        folder / "expected.npz",
        inputs=models.inputs(),
        refused=np.array(refused),
        versions=np.array([version(), tf.__version__, np.__version__, platform.python_version()]),
        **outputs,
    )


def main(to):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        with tarfile.open(Path(to) / f"{version()}.tar.xz", "w:xz") as archive:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and path.name not in ("saved_model.pb", "keras_metadata.pb"):
                    archive.add(path, path.relative_to(folder).as_posix())


if __name__ == "__main__":
    main(sys.argv[1])
