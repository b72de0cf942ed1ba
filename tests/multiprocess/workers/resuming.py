"""Trainings that end early and go on in another process, and backups that cannot; as JSON."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

from syncbn.layer import SyncBatchNormalization
from syncbn.multi_worker import backup_files, enable_multi_worker
from tests.multiprocess.leaving import leave

# The test imports the names of the cases, and is no worker.
WORKER = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]["index"]
EPOCHS, STEPS = 3, 3
LAYERS, OPTIMIZERS = keras.layers, keras.optimizers
rng = np.random.default_rng(0)
X = rng.normal(size=(26, 6)).astype("float32")  # a last batch that is not full
Y = X.sum(axis=1, keepdims=True)


class Batches(keras.utils.PyDataset):
    """Copies, as TensorFlow calculates within the memory of arrays that it is given."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Any:
        part = slice(8 * index, 8 * index + 8)
        return X[part].copy(), Y[part].copy()


def model_of(layers: list[Any], optimizer: Any) -> Any:
    model = keras.Sequential([keras.Input((6,)), *layers, LAYERS.Dense(1)])
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def sgd(**options: Any) -> Any:
    return OPTIMIZERS.SGD(0.05, momentum=0.9, **options)


def adam() -> Any:
    rate = OPTIMIZERS.schedules.CosineDecay(0.02, EPOCHS * STEPS)
    return OPTIMIZERS.Adam(rate, clipnorm=0.5, use_ema=True, ema_overwrite_frequency=4)


# By name: layers, optimizer, what fit is given.
CASES: dict[str, tuple[Callable[[], list[Any]], Callable[[], Any], dict[str, Any]]] = {
    "arrays": (lambda: [], sgd, {}),
    "PyDataset": (lambda: [LAYERS.Dense(4, "tanh")], adam, {"x": lambda: Batches(workers=2)}),
    "steps_per_epoch": (lambda: [], sgd, {"steps_per_epoch": 4, "shuffle": "batch"}),
    "random": (
        lambda: [
            LAYERS.Reshape((2, 3, 1)),
            LAYERS.RandomTranslation(0.3, 0.3),
            LAYERS.Flatten(),
            SyncBatchNormalization(),
            LAYERS.Dropout(0.3),
            LAYERS.GaussianNoise(0.1, seed=3),
        ],
        lambda: OPTIMIZERS.LossScaleOptimizer(
            sgd(gradient_accumulation_steps=2), dynamic_growth_steps=2
        ),
        {"validation_data": (X[:9], Y[:9])},
    ),
}


class Ends(keras.callbacks.Callback):
    """A kill of one worker in the middle of the third epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        if (self.epoch, batch, WORKER) == (EPOCHS - 1, 1, 1):
            os.kill(os.getpid(), signal.SIGKILL)


class Keeps(keras.callbacks.Callback):
    """A copy of the chief's backup, as a kill in the third epoch leaves it."""

    def __init__(self, folder: Path, copy: Path) -> None:
        super().__init__()
        self.folder, self.copy = folder, copy

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's
        if epoch == EPOCHS - 1 and WORKER == 0:
            shutil.copytree(self.folder, self.copy)


class Job:
    """The workers' strategy, and what was found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        self.found: dict[str, Any] = {}

    def fit(self, name: str, seed: int, *callbacks: Any, epochs: int = EPOCHS) -> Any:
        """The bits of all that a case has trained, from a program that begins with the seed."""
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(seed)
        layers, optimizer, options = CASES[name]
        with self.strategy.scope():
            model = model_of(layers(), optimizer())
        data = options.get("x")
        inputs = {"x": data()} if data else {"x": X, "y": Y, "batch_size": 8 + (name == "arrays")}
        rest = {key: value for key, value in options.items() if key != "x"}
        history = model.fit(**inputs, epochs=epochs, verbose=0, callbacks=list(callbacks), **rest)
        state = [*model.variables, *model.optimizer.variables]
        return [variable.numpy().tobytes().hex() for variable in state], history.epoch

    def backup(self, name: str, **options: Any) -> Any:
        """On this worker's own disk."""
        return keras.callbacks.BackupAndRestore(self.folder / f"{WORKER}" / name, **options)


def whole(job: Job) -> None:
    for name in CASES:
        print(name, flush=True)  # what a failure is of
        backup = job.backup(f"{name} whole")
        keeps = Keeps(Path(backup.backup_dir), job.folder / f"{WORKER}" / name)
        job.found[name] = job.fit(name, 1, backup, keeps)


def killed(job: Job) -> None:
    try:
        job.fit("random", 1, job.backup("killed"), Ends())
    except RuntimeError as error:
        job.found["error"] = type(error).__name__


def resumed(job: Job) -> None:
    """By a program that begins with another seed, so that nothing is right by luck."""
    for name in CASES:
        job.found[name] = job.fit(name, 2 + WORKER, job.backup(name))
    # The kill was of one worker: the chief alone knows how far it was.
    job.found["killed"] = job.fit("random", 1, job.backup("killed"))
    job.found["left"] = [path.name for path in job.folder.glob(f"{WORKER}/*") if path.name in CASES]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def of_keras(path: Path) -> None:
    """As Keras writes them, without a checksum: epoch and batch alone."""
    path.write_text(json.dumps({"epoch": 2, "batch": 0}))


# By name: what is done to which files; more kinds are in tests/unit/test_backup_files.py.
WEIGHTS, METADATA = "latest.weights.h5", "training_metadata.json"
DAMAGES: dict[str, dict[str, Callable[[Path], Any]]] = {
    "truncated": {WEIGHTS: cut},
    "one byte": {WEIGHTS: flip},
    "no weights": {WEIGHTS: Path.unlink},
    "no metadata": {METADATA: Path.unlink},
    "not JSON": {METADATA: lambda path: path.write_text("{")},
    "truncated, of Keras": {WEIGHTS: cut, METADATA: of_keras},
    "empty, of Keras": {WEIGHTS: lambda path: os.truncate(path, 0), METADATA: of_keras},
    "another optimizer, of Keras": {METADATA: of_keras},
    "another model": {},
}


# Those that are met with a previous backup too.
PREVIOUS = {"one byte", "no metadata", "truncated, of Keras", "another model"}


def contents(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes().hex() for path in folder.glob("*")}


def damaged(job: Job) -> None:
    """Each damage without and with a previous backup, one after another in the same processes."""
    CASES["another model"] = (lambda: [LAYERS.Dense(5)], sgd, {})
    CASES["another optimizer"] = (lambda: [], OPTIMIZERS.Adam, {})
    good = job.folder / "0" / "good"
    whole = job.backup("damaged whole", double_checkpoint=True)
    job.fit("arrays", 1, whole, Keeps(Path(whole.backup_dir), good))
    for damage, files in DAMAGES.items():
        name = damage.removesuffix(", of Keras")
        name = name if name in CASES else "arrays"
        for double in (False, True) if damage in PREVIOUS else (False,):
            folder = job.folder / "0" / f"{damage} {double}"
            if WORKER == 0:
                shutil.copytree(good, folder)
                for file, change in files.items():
                    change(folder / file)
            job.found[f"{damage} {double}"] = attempt(job, name, folder, double)
    of_keras_whole = job.folder / "0" / "of Keras"
    if WORKER == 0:
        shutil.copytree(good, of_keras_whole)
        of_keras(of_keras_whole / METADATA)
    job.found["of Keras"] = attempt(job, "arrays", of_keras_whole, double=False)
    file = job.folder / "file"
    file.touch()
    job.found["a file"] = attempt(job, "arrays", file, double=False)
    job.found["goes on"] = attempt(job, "arrays", job.folder / "0" / "new", double=False)


def attempt(job: Job, name: str, folder: Path, double: bool) -> dict[str, Any]:
    """Resume, and what came of it."""
    before = contents(folder)
    epochs: list[int] = []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: epochs.append(epoch))
    callback = keras.callbacks.BackupAndRestore(folder, double_checkpoint=double, save_freq=False)
    callback.delete_checkpoint = False
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            job.fit(name, 2, callback, note)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
            found["error"] = [type(error).__name__, str(error)]
    found["warnings"] = [str(w.message) for w in caught if "backup" in str(w.message)]
    return found | {"epochs": epochs, "unchanged": contents(folder) == before}


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def full(job: Job) -> None:
    """A disk of 256 KiB and a model of 80 KB: room for two backups, until something else comes."""
    CASES["wide"] = (lambda: [LAYERS.Dense(1300)], sgd, {})
    folder = job.folder / f"disk{WORKER}"
    folder.mkdir()
    mount(folder, "size=256k")
    filler = folder / "filler"
    states: list[Any] = []
    free_bytes = backup_files.free_bytes

    def fill(epoch: int, logs: Any = None) -> None:  # noqa: ARG001 - called by name
        """Before the epoch's backup is written."""
        if WORKER > 0:
            return
        filler.unlink(missing_ok=True)
        backup_files.free_bytes = free_bytes
        free = shutil.disk_usage(folder).free
        if epoch in {1, 2}:
            filler.write_bytes(bytes(free - 40 * 1024))
        if epoch == 2:  # as under a quota: only a write tells
            backup_files.free_bytes = lambda _: None
        if epoch == 3:  # room for the weights, and none for what belongs to them
            size = (folder / "backup" / WEIGHTS).stat().st_size
            filler.write_bytes(bytes(free - -(-size // 4096) * 4096))

    def look(epoch: int, logs: Any = None) -> None:  # noqa: ARG001 - called by name
        if WORKER == 0:
            found = json.loads((folder / "backup" / METADATA).read_text())["epoch"]
            files = sorted(path.name for path in (folder / "backup").iterdir())
            whole = backup_files.read(
                backup_files.Pair(folder / "backup" / WEIGHTS, folder / "backup" / METADATA)
            )
            states.append([found, files, whole is not None])

    before = keras.callbacks.LambdaCallback(on_epoch_end=fill)
    after = keras.callbacks.LambdaCallback(on_epoch_end=look)
    backup = keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job.fit("wide", 1, before, backup, after, epochs=5)
        job.found["warnings"] = [str(w.message) for w in caught if "backup" in str(w.message)]
        job.found["states"] = states
    no_room_for_the_folder(job)


def no_room_for_the_folder(job: Job) -> None:
    folder = job.folder / f"inodes{WORKER}"
    folder.mkdir()
    mount(folder, "size=1m,nr_inodes=1")

    def make_room(epoch: int, logs: Any = None) -> None:  # noqa: ARG001 - called by name
        if epoch == 1:
            mount(folder, "remount,nr_inodes=100")

    room = keras.callbacks.LambdaCallback(on_epoch_begin=make_room)
    backup = keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job.fit("arrays", 1, room, backup, epochs=2)
        job.found["mkdir"] = [str(w.message) for w in caught if "backup" in str(w.message)]
    job.found["made"] = sorted(path.name for path in folder.glob("backup/*"))


SCENARIOS = {f.__name__: f for f in (whole, killed, resumed, damaged, full)}


def main(name: str, folder: Path) -> None:
    enable_multi_worker(timeout=30)
    random.seed(WORKER)
    job = Job(folder)
    try:
        SCENARIOS[name](job)
    except BaseException:  # noqa: BLE001 - reported, and the process ended
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    (folder / f"{name}{WORKER}.json").write_text(json.dumps(job.found))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
