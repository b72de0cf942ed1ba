"""Callbacks: the same decisions on all workers, files by the chief alone, saving and resuming."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

import syncbn
from tests.scenarios.models import dense_model, fit, gather_history, normal, observe_model, targets
from tests.scenarios.scenario import FEW, MULTI_WORKER, scenario
from tests.scenarios.world import REFERENCE, World

_C = keras.callbacks


def _data() -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    validation = (normal(33, 6, seed=3), targets(33, seed=4))
    return normal(65, 6), targets(65), validation


def _fit(world: World, callbacks: list[Any], epochs: int = 4, **options: Any) -> Any:
    x, y, validation = _data()
    model = dense_model(world, metrics=lambda: ["mae"], **options)
    return model, dict(
        fit(model, x, y, epochs=epochs, callbacks=callbacks, validation_data=validation)
    )


@scenario(covers=["EarlyStopping"])
def early_stopping(world: World) -> Any:
    stopping = _C.EarlyStopping("loss", min_delta=0.08, patience=1, restore_best_weights=True)
    _, observed = _fit(world, [stopping], epochs=12)
    return {**observed, "stopped": stopping.stopped_epoch, "best": stopping.best_epoch}


@scenario(covers=["ReduceLROnPlateau"])
def plateau(world: World) -> Any:
    return _fit(world, [_C.ReduceLROnPlateau("loss", 0.5, patience=0, min_delta=0.3)])[1]


@scenario(covers=["LearningRateScheduler"])
def scheduler(world: World) -> Any:
    return _fit(world, [_C.LearningRateScheduler(lambda epoch: 0.1 / (1 + epoch))])[1]


def _checkpoint(suffix: str, weights_only: bool) -> Any:
    def run(world: World) -> Any:
        path = world.folder / f"best{suffix}"
        checkpoint = _C.ModelCheckpoint(
            path, "loss", save_best_only=True, save_weights_only=weights_only
        )
        model, observed = _fit(world, [checkpoint], epochs=3)
        observed["files"] = world.files()
        if weights_only:
            model.load_weights(path)
        else:
            with world.scope():
                model = keras.models.load_model(path)
        observed["loaded"] = model.predict(normal(9, 6), verbose=0)
        return observed

    return run


for _suffix, _weights_only in {".keras": False, ".weights.h5": True}.items():
    scenario(
        name=f"checkpoint[{_suffix}]",
        covers=["ModelCheckpoint, the same path"],
        core=() if _weights_only else FEW,
    )(_checkpoint(_suffix, _weights_only))


def _written_into(folder: Path) -> set[str]:
    """Files of the folder that this process opens for writing from now on, as it does so."""
    found: set[str] = set()

    def note(event: str, arguments: Any) -> None:
        path, mode = arguments[:2] if event == "open" else (None, None)
        if isinstance(path, str) and Path(path).is_relative_to(folder) and "r" not in (mode or "r"):
            found.add(path)

    # It cannot be taken out again; the folder is of one scenario.
    sys.addaudithook(note)
    return found


@scenario(
    covers=["CSVLogger", "files by the chief alone"],
    repairs=["chief-writes"],
    witnesses=("workers2x1",),
)
def csv(world: World) -> Any:
    path = world.folder / "log.csv"
    written = _written_into(world.folder)
    _, observed = _fit(world, [_C.CSVLogger(path)])
    observed["files"] = world.files()
    observed["written by the right worker"] = bool(written) == world.is_chief
    lines = path.read_text().splitlines()
    numbers = np.array([[float(cell) for cell in line.split(",")] for line in lines[1:]])
    return {**observed, "header": lines[0], "numbers": numbers}


class Interrupt(_C.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's
        if epoch == 2:
            raise KeyboardInterrupt


@scenario(
    covers=["BackupAndRestore, interrupted and resumed"],
)
def backup(world: World) -> Any:
    folder = world.folder / "backup"
    x, y, validation = _data()
    options = {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}
    model = dense_model(world, **options)
    try:
        fit(model, x, y, epochs=4, callbacks=[_C.BackupAndRestore(folder), Interrupt()])
    except KeyboardInterrupt:
        interrupted = world.files()
    keras.utils.clear_session(free_memory=False)
    model = dense_model(world, **options)
    resumed = _C.BackupAndRestore(folder)
    observed = fit(model, x, y, epochs=4, callbacks=[resumed], validation_data=validation)
    return {**observed, "interrupted": interrupted, "files": world.files()}


@scenario(covers=["TerminateOnNaN"])
def terminate_on_nan(world: World) -> Any:
    x, y, _ = _data()
    y[64] = np.nan
    model = dense_model(world, normalized=False)
    return fit(model, x, y, epochs=3, callbacks=[_C.TerminateOnNaN()])


@scenario(covers=["SwapEMAWeights"])
def swapped_weights(world: World) -> Any:
    def optimizer() -> Any:
        return keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.7)

    return _fit(world, [_C.SwapEMAWeights(swap_on_epoch=True)], optimizer=optimizer)[1]


def tensor_board(world: World) -> Any:
    """How many event files there are: one of training and one of validation."""
    _, observed = _fit(world, [_C.TensorBoard(world.folder / "events")], epochs=2)
    files = [Path(name).parts for name in world.files()]
    observed["files"] = sorted(parts[1] for parts in files if parts[-1].startswith("events.out"))
    return observed


# Keras's callback is of use only with that package.
if importlib.util.find_spec("tensorboard"):
    scenario(covers=["TensorBoard: its files are the chief's"])(tensor_board)


@scenario(
    covers=["stop_training on one worker only"],
    core=FEW,
    repairs=["in-step"],
    witnesses=("workers2x1",),
)
def stop_on_one_worker(world: World) -> Any:
    """The decision of any worker is that of all, at the end of the epoch."""

    class Stop(_C.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's
            if epoch == 1 and world.worker == world.workers - 1:
                self.model.stop_training = True

    x, y, _ = _data()
    return fit(dense_model(world), x, y, epochs=4, callbacks=[Stop()])


@scenario(covers=["stop_training on one worker only, within an epoch"])
def stop_on_one_worker_within_an_epoch(world: World) -> Any:
    class Stop(_C.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            if batch == 1 and world.worker == world.workers - 1:
                self.model.stop_training = True

    x, y, _ = _data()
    model = dense_model(world)
    fit(model, x, y, batch_size=16, epochs=2, callbacks=[Stop()])
    # On one device after 2 of 5 steps; workers have begun the next when they hear of it.
    return {"within the epoch": 2 <= np.array(model.optimizer.iterations) < 5}


def _on_the_chief(what: str) -> Any:
    def run(world: World) -> Any:
        x, y, _ = _data()
        model = dense_model(world)

        def collective(epoch: int, logs: Any) -> None:  # noqa: ARG001 - called by name
            if world.is_chief:
                getattr(model, what)(*((x, y) if what == "evaluate" else (x,)))

        return fit(model, x, y, callbacks=[_C.LambdaCallback(on_epoch_end=collective)])

    return run


for _what in ("evaluate", "predict", "predict_on_batch"):
    scenario(
        name=f"{_what} on the chief alone",
        covers=["what only the chief does"],
        repairs=["in-step"],
        witnesses=("workers2x1",),
        error=("WorkerError", "chief|worker"),
        error_worlds=MULTI_WORKER,
        worlds=("one", *MULTI_WORKER),
    )(_on_the_chief(_what))


@scenario(
    covers=["a worker that is late"],
    repairs=["named-timeouts"],
    witnesses=("workers2x1",),
    error=("WorkerError", "waited"),
    error_worlds=MULTI_WORKER,
    worlds=("one", *MULTI_WORKER),
    timeout=6,
    breaks=True,
)
def late_worker(world: World) -> Any:
    """The last worker's data are later than a collective may take: none waits for ever."""
    x, y, _ = _data()

    class Late(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            if index == 2 and world.worker > 0:
                time.sleep(15)
            return x[16 * index : 16 * (index + 1)], y[16 * index : 16 * (index + 1)]

    return fit(dense_model(world), Late())


@scenario(covers=["evaluate within a callback, on all workers"])
def evaluate_in_a_callback(world: World) -> Any:
    x, y, (vx, vy) = _data()
    model = dense_model(world, metrics=lambda: ["mae"])
    logs: list[Any] = []

    class Evaluate(_C.Callback):
        def on_epoch_end(self, epoch: int, logs_: Any = None) -> None:  # noqa: ARG002
            logs.append(model.evaluate(vx, vy, batch_size=16, verbose=0))

    observed = fit(model, x, y, callbacks=[Evaluate()])
    return {**observed, "evaluated": logs}


def _saved(suffix: str) -> Any:
    def run(world: World) -> Any:
        x, y, _ = _data()
        path = world.folder / f"model{world.worker}{suffix}"
        # Keras reads no functions, as "mse" is one, from an .h5 file.
        loss = keras.losses.MeanSquaredError()
        optimizer = keras.optimizers.SGD
        model = dense_model(world, loss=loss, optimizer=lambda: optimizer(0.05, momentum=0.9))
        observed = gather_history(model.fit(x, y, batch_size=64, shuffle=False, verbose=0))
        model.save(path)
        with world.scope():
            loaded = keras.models.load_model(path)
        if suffix == ".h5" and world.name == REFERENCE:
            # Keras as it is cannot go on with one of these; what was saved is what goes on.
            loaded = model
        second = loaded.fit(x, y, batch_size=64, shuffle=False, verbose=0)
        return {**observed, **gather_history(second, "second"), **observe_model(loaded)}

    return run


for _suffix in (".keras", ".h5"):
    scenario(
        name=f"saved[{_suffix}]",
        covers=[f"{_suffix}: saved, loaded in the scope, trained on"],
        repairs=["legacy-files"] if _suffix == ".h5" else [],
    )(_saved(_suffix))


@scenario(covers=["saved on replicas, loaded on one device"])
def loaded_outside(world: World) -> Any:
    x, y, _ = _data()
    path = world.folder / f"model{world.worker}.keras"
    model = dense_model(world)
    fit(model, x, y)
    model.save(path)
    loaded = keras.models.load_model(path, custom_objects={"syncbn": syncbn})
    return {"predicted": loaded.predict(x, batch_size=64, verbose=0)}
