# %% [markdown]
"""A model of keras.applications, converted, fine-tuned on replicas, checked and saved.

What it shows
    MobileNetV2 has 52 batch normalizations, none synchronized. `syncbn.convert` changes them in
    place; two replicas then take the steps that one device takes, and train on;
    `syncbn.recalibrate` sets the moving statistics, which a short training leaves far from where
    they belong; and `syncbn.revert` makes it a model of Keras alone, which opens where syncbn is
    not installed.

Run it (a minute on two cores; needs scikit-learn)
    python examples/convert_applications.py
    python examples/convert_applications.py --output digits.keras

What comes out
    How many layers were converted, the largest difference from one device (relative to each
    array's largest value: 1e-3 or less, as 52 normalizations of few elements amplify the last
    bit so far, where Keras's own layers are off by 0.1 or more), the loss in training, in inference
    before and after recalibration, and whether the saved file needs syncbn: it does not.

The weights begin at random, as this needs no network: with `weights="imagenet"` the rest is the
same.
"""

# %%
from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import syncbn

keras.config.set_floatx("float64")  # for the comparison alone: rounding is small in it


# %% [markdown]
# ## Data: digits, enlarged to 32 × 32, on three channels
# %%
def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) from −1 to 1, as MobileNetV2 takes them, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = images[:count].reshape(-1, 8, 8, 1).repeat(4, axis=1).repeat(4, axis=2)
    return np.repeat(images / 8 - 1, 3, axis=-1), labels[:count]


# %% [markdown]
# ## The model, with a new head
# Its backbone is a model within the model: `convert` looks into it. It is given the outermost.
# %%
def build_model(name: str) -> keras.Model:
    """The backbone of a third of the channels, and a dense layer for ten classes."""
    keras.utils.set_random_seed(0)
    application = getattr(keras.applications, name)
    backbone = application((32, 32, 3), alpha=0.35, include_top=False, weights=None)
    pooling, head = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)
    return keras.Sequential([keras.Input((32, 32, 3)), backbone, pooling, head], name="digits")


def fine_tuned(strategy: Any, settings: argparse.Namespace, *, converted: bool) -> keras.Model:
    """The model after three steps, of 16, 16 and 5 images."""
    x, y = digits(2 * 16 + 5)
    with strategy.scope():
        model = build_model(settings.model)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss, jit_compile=False)
    if converted:
        print(syncbn.plan_conversion(model))
        syncbn.convert(model, verbose=False)
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    return model


# %% [markdown]
# ## How far from one device
# %%
def distance(model: keras.Model, reference: keras.Model) -> float:
    """The largest difference of any array, relative to that array's largest value."""
    pairs = zip(model.get_weights(), reference.get_weights(), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-12)) for a, b in pairs)


def main() -> None:
    """Convert, fine-tune, compare, recalibrate, revert, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("MobileNet", "MobileNetV2"), default="MobileNetV2")
    parser.add_argument("--examples", type=int, default=330)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("digits.keras"))
    settings = parser.parse_args()

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    syncbn.enable_multi_worker()
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    one_device = fine_tuned(tf.distribute.get_strategy(), settings, converted=False)
    model = fine_tuned(strategy, settings, converted=True)
    print(f"converted, 2 replicas: {distance(model, one_device):.0e} from one device")
    local = fine_tuned(strategy, settings, converted=False)
    print(f"as it was, 2 replicas: {distance(local, one_device):.0e} from one device")

    # %% [markdown]
    # On with the training, at a larger rate: there two trainings part by rounding alone, as so many
    # layers amplify it, and there is nothing to compare.
    # %%
    x, y = digits(settings.examples)
    model.optimizer.learning_rate = 0.02
    history = model.fit(x, y, batch_size=16, epochs=settings.epochs, verbose=0)
    print(f"loss in training: {history.history['loss'][-1]:.3f}")

    # %% [markdown]
    # A moving average with momentum 0.999, as MobileNetV2 has it, takes thousands of steps to
    # arrive. Recalibration takes one pass, with the weights as they are.
    # %%
    before = model.evaluate(x, y, batch_size=16, verbose=0)
    report = syncbn.recalibrate(model, x, batch_size=16)
    after = model.evaluate(x, y, batch_size=16, verbose=0)
    print(report)
    print(f"loss in inference: {before:.3f} by the moving averages, {after:.3f} recalibrated")

    # %% [markdown]
    # Reverted it is Keras's again, with the same answers, and so is the file.
    # %%
    answers = model.predict(x[:16], verbose=0)
    syncbn.revert(model, verbose=False).save(settings.output)
    loaded = keras.saving.load_model(settings.output)
    kinds = {type(layer).__name__ for layer in loaded._flatten_layers()}
    print(
        f"{settings.output.name}: syncbn needed: {'SyncBatchNormalization' in kinds}, answers off "
        f"by {np.abs(loaded.predict(x[:16], verbose=0) - answers).max():.0e}"
    )


if __name__ == "__main__":
    main()
