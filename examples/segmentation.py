# %% [markdown]
"""Segmentation with one image a replica, where synchronized statistics decide.

What it shows
    Images as a scanner gives them: a pixel's class is its *absolute* intensity (fat is dark, bone
    is bright, on every image), under noise that takes a neighbourhood to see through. Four
    replicas train a small U-Net on one image each, in three ways from the same weights, on the
    same images in the same order:

    - local: `keras.layers.BatchNormalization`, which normalizes each image by itself in training,
      and with that takes away what tells the classes apart;
    - synchronized: `syncbn.SyncBatchNormalization`, by the statistics of all four;
    - one device: Keras's layer on the whole batch of four, without a strategy.

Run it (about a minute a seed on two cores, without a GPU)
    python examples/segmentation.py
    python examples/segmentation.py --seeds 5 --output docs/images/segmentation.png

What comes out
    A line for each run with the mean intersection over union (IoU) on images never seen, and a
    picture: curves over the steps, and what each network says of a few images.
"""

# %%
from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import syncbn

CLASSES = 3
SIZE = 32
KINDS = ("local", "synchronized", "one device")


# %% [markdown]
# ## Images
# A background and a few discs, each of an intensity between 0 and 3; the class is its whole part.
# Most images are mostly of one class, as slices of a body are. Nothing but the intensity tells the
# classes apart: the same image, brighter by one, is another answer.
# %%
def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, SIZE, SIZE, 1) and the class of each pixel (count, SIZE, SIZE)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    level = np.broadcast_to(rng.uniform(0, CLASSES, (count, 1, 1)), (count, SIZE, SIZE)).copy()
    for image in level:
        for _ in range(rng.integers(1, 3)):
            row, column = rng.uniform(0, SIZE, 2)
            disc = (rows - row) ** 2 + (columns - column) ** 2 < rng.uniform(4, 10) ** 2
            image[disc] = rng.uniform(0, CLASSES)
    noisy = level + rng.normal(0, 0.5, level.shape)
    return noisy[..., None].astype("float32"), level.astype("int32")


# %% [markdown]
# ## The network
# A U-Net of two levels. The normalization is the only thing that differs between the runs.
# %%
def unet(norm: type[keras.layers.Layer]) -> keras.Model:
    """Logits of each pixel's class."""
    layers = keras.layers

    def block(x: Any, channels: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(norm(momentum=0.95)(x))
        return x

    inputs = keras.Input((SIZE, SIZE, 1))
    fine = block(inputs, 8)
    coarse = block(layers.MaxPooling2D()(fine), 16)
    x = layers.Concatenate()([layers.UpSampling2D()(coarse), fine])
    return keras.Model(inputs, layers.Conv2D(CLASSES, 1)(block(x, 8)))


# %% [markdown]
# ## Training
# `enable_multi_worker()` makes `fit` on replicas take the steps of one device. After every few
# steps the network is asked about images that it has not seen, in inference, by the moving
# statistics that would be saved.
# %%
def iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union, the mean of the classes."""
    both = [np.sum((predicted == k) & (truth == k)) for k in range(CLASSES)]
    either = [np.sum((predicted == k) | (truth == k)) for k in range(CLASSES)]
    return float(np.mean(np.divide(both, either)))


class Curve(keras.callbacks.Callback):
    """Asks the model about the validation images after each epoch."""

    def __init__(self, x: np.ndarray, truth: np.ndarray) -> None:
        super().__init__()
        self.x, self.truth = x, truth
        self.values: list[float] = []
        self.predicted = truth

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """One more value of IoU."""
        del epoch, logs
        logits = keras.ops.convert_to_numpy(self.model(self.x, training=False))
        self.predicted = logits.argmax(-1)
        self.values.append(iou(self.predicted, self.truth))


class Run(NamedTuple):
    """What one training came to."""

    curve: list[float]  # IoU after each `every` steps
    predicted: np.ndarray  # classes of the validation images, at the end


def train(kind: str, strategy: Any, seed: int, steps: int, every: int) -> Run:
    """Train in one of the KINDS."""
    batch = strategy.num_replicas_in_sync
    if kind == "one device":
        strategy = tf.distribute.get_strategy()
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        norm = keras.layers.BatchNormalization
        model = unet(syncbn.SyncBatchNormalization if kind == "synchronized" else norm)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        rate = keras.optimizers.schedules.CosineDecay(1e-2, steps)
        model.compile(keras.optimizers.Adam(rate), loss, jit_compile=False)
    data = tf.data.Dataset.from_tensor_slices(images(steps * batch, seed)).batch(batch).repeat()
    curve = Curve(*images(64, seed=10_000))
    model.fit(data, epochs=steps // every, steps_per_epoch=every, verbose=0, callbacks=[curve])
    return Run(curve.values, curve.predicted)


# %% [markdown]
# ## Several seeds, and a picture
# One training proves little: `--seeds 5` repeats it with other images and other first weights.
# %%
def draw(runs: dict[str, list[Run]], every: int, path: Path) -> None:
    """Median and range of the curves over the seeds; predictions of the first seed."""
    from matplotlib.figure import Figure

    x, truth = images(64, seed=10_000)
    shown = (0, 1, 2)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    axes = left.subplots()
    for (kind, trained), style in zip(runs.items(), ("-", "-", "--"), strict=True):
        curves = np.array([run.curve for run in trained])
        steps = every * np.arange(1, curves.shape[1] + 1)
        (line,) = axes.plot(steps, np.median(curves, axis=0), style, label=kind)
        axes.fill_between(
            steps, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.15
        )
    axes.set(xlabel="steps", ylabel="IoU on images never seen", ylim=(0, 1))
    axes.set_title(f"median and range of {len(trained)} seeds", fontsize=10)
    axes.legend(loc="lower right")

    columns = {"image": None, "truth": truth}
    columns |= {kind: trained[0].predicted for kind, trained in runs.items()}
    for row, panels in zip(shown, right.subplots(len(shown), len(columns)), strict=True):
        for panel, (name, classes) in zip(panels, columns.items(), strict=True):
            if classes is None:
                panel.imshow(x[row, ..., 0], cmap="gray", vmin=-0.5, vmax=CLASSES + 0.5)
            else:
                panel.imshow(classes[row], cmap="viridis", vmin=0, vmax=CLASSES - 1)
            panel.set(xticks=[], yticks=[])
            if row == shown[0]:
                panel.set_title(name, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Train all kinds for each seed, print their IoU, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="45 steps: a rougher answer")
    parser.add_argument("--output", type=Path, default=Path("segmentation.png"))
    arguments = parser.parse_args()
    steps = 45 if arguments.quick else arguments.steps
    every = max(1, steps // 15)

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * arguments.replicas
    )
    syncbn.enable_multi_worker()
    # One strategy for all runs: TensorFlow numbers the collectives of a second like the first's.
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(arguments.replicas)])

    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for seed in range(arguments.seeds):
        for kind, trained in runs.items():
            trained.append(train(kind, strategy, seed, steps, every))
            print(f"seed {seed}, {kind}: IoU {trained[-1].curve[-1]:.3f}", flush=True)
    for kind, trained in runs.items():
        ends = [run.curve[-1] for run in trained]
        print(f"{kind}: median IoU {np.median(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})")
    draw(runs, every, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
