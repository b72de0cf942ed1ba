"""A worker that does alone what needs all of them, and what came of it, as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

from syncbn.errors import WorkerError
from syncbn.multi_worker import board, enable_multi_worker
from tests.multiprocess.leaving import leave

WORKER = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
STEPS = 4  # of an epoch


class Calls(keras.callbacks.Callback):
    """Calls a function of the model and a number at one moment, on all workers or on one."""

    def __init__(self, moment: str, function: Callable[..., Any], only: int | None = None) -> None:
        super().__init__()
        self.function = function
        self.runs_here = only in {None, WORKER}
        setattr(self, moment, self.on_the_moment)

    def on_the_moment(self, number: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's
        if self.runs_here:
            self.function(self.model, number)


class Job:
    """A model in the scope of the workers, its data, and what was found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        self.found: dict[str, Any] = {}
        generator = np.random.default_rng(0)
        self.x = generator.normal(size=(8 * STEPS, 3)).astype("float32")
        self.y = self.x.sum(axis=1, keepdims=True)
        self.model = self.new_model()

    def new_model(self) -> keras.Model:
        keras.utils.set_random_seed(1)
        with self.strategy.scope():
            model = keras.Sequential(
                [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
            )
            model.compile("adam", "mse", metrics=["mae"])
        return model

    def fit(self, *callbacks: Any, epochs: int = 1, x: Any = None, model: Any = None) -> Any:
        """Trains; the numbers of the steps that were done."""
        steps: list[int] = []
        done = Calls("on_train_batch_end", lambda _, step: steps.append(step))
        (model or self.model).fit(
            self.x if x is None else x,
            self.y,
            batch_size=8,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[done, *callbacks],
        )
        return steps

    def record(self, name: str, function: Callable[[], Any]) -> None:
        """Notes what a function gives or raises, and how long that took."""
        begun = time.monotonic()
        try:
            outcome = function()
        except WorkerError as error:
            outcome = {"error": str(error), "cause": type(error.__cause__).__name__}
        self.found[name] = {"outcome": outcome, "seconds": time.monotonic() - begun}

    def evaluate(self, model: Any, _: int = 0) -> list[float]:
        return list(model.evaluate(self.x, self.y, batch_size=8, verbose=0))


def stop_after(number: int) -> Callable[[Any, int], None]:
    def stop(model: Any, step: int) -> None:
        if step == number:
            model.stop_training = True

    return stop


def stops(job: Job) -> None:
    """Requests to stop, of one worker and of all."""
    moment = "on_train_batch_end"
    job.record("stop by one", lambda: job.fit(Calls(moment, stop_after(1), only=1)))
    job.record("stop by all", lambda: job.fit(Calls(moment, stop_after(1))))
    last = Calls(moment, stop_after(STEPS - 1), only=0)
    job.record("stop by one at the last step", lambda: job.fit(last, epochs=3))
    end = Calls("on_epoch_end", stop_after(0), only=1)
    job.record("stop by one at the end of an epoch", lambda: job.fit(end, epochs=3))
    bad = job.x.copy()
    bad[8 * 2 + 6] = np.nan  # in the third global batch, in the part of the second worker
    spoilt = job.new_model()
    nan = keras.callbacks.TerminateOnNaN()
    job.record("stop by NaN", lambda: job.fit(nan, x=bad, model=spoilt))


def alone(job: Job) -> None:
    """What the chief's callback does alone, and what the callbacks of all do."""
    seen: list[Any] = []

    def look(model: Any, _: int) -> None:
        seen.append([*job.evaluate(model), float(model.metrics[0].result())])

    job.record("callbacks of all", lambda: job.fit(Calls("on_epoch_end", look), epochs=2) and seen)
    calls = {
        "evaluate": job.evaluate,
        "predict": lambda model, _: model.predict(job.x, batch_size=8, verbose=0),
        "train_on_batch": lambda model, _: model.train_on_batch(job.x[:8], job.y[:8]),
        "metric": lambda model, _: float(model.metrics[0].result()),
    }
    for name, call in calls.items():
        callback = Calls("on_epoch_end", call, only=0)
        job.record(f"{name} alone", lambda callback=callback: job.fit(callback))
    job.record("epochs differ", lambda: job.fit(epochs=1 + WORKER))
    job.record("after all that", lambda: len(job.fit()))


def files(job: Job) -> None:
    """The callbacks that write, all given one path, and a backup that only the chief has."""
    shared = job.folder / "shared"
    best = keras.callbacks.ModelCheckpoint(shared / "best.keras", "loss", save_best_only=True)
    weights = keras.callbacks.ModelCheckpoint(shared / "{epoch}.weights.h5", save_weights_only=True)
    log = keras.callbacks.CSVLogger(shared / "log.csv")
    written: list[str] = []
    rename = Path.replace
    Path.replace = lambda path, target: written.append(Path(target).name) or rename(path, target)
    shared.mkdir(exist_ok=True)
    job.record("checkpoints", lambda: len(job.fit(best, weights, log, epochs=2)))
    job.found["best"] = best.best
    job.found["written"] = written
    job.found["opened the log"] = log.csv_file is not None

    def backup() -> keras.callbacks.BackupAndRestore:
        return keras.callbacks.BackupAndRestore(job.folder / f"backup{WORKER}")

    def interrupt(_: Any, epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    try:
        job.fit(backup(), Calls("on_epoch_begin", interrupt), epochs=4)
    except KeyboardInterrupt:
        job.found["backup"] = sorted(path.name for path in job.folder.glob(f"backup{WORKER}/*"))
    interrupted = [variable.numpy() for variable in variables(job.model)]
    resumed = job.new_model()
    for variable in resumed.trainable_variables:
        variable.assign(variable + WORKER)

    def compare(model: Any, _: Any = None) -> None:
        if "restored" not in job.found:
            both = zip(interrupted, variables(model), strict=True)
            job.found["restored"] = all(np.array_equal(a, b.numpy()) for a, b in both)

    restored = Calls("on_epoch_begin", compare)
    job.record("resumed", lambda: job.fit(backup(), restored, epochs=4, model=resumed))


def variables(model: Any) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


def together(job: Job) -> None:
    """All that leaves the workers able to go on; what does not, last."""
    job.found["agree"] = board.agree(job.strategy, "a seed", 10 + WORKER)
    job.found["exchange"] = board.exchange(job.strategy, "a word", f"from {WORKER}")
    stops(job)
    alone(job)
    files(job)
    within = Calls("on_train_batch_end", job.evaluate, only=0)
    job.record("evaluate alone within an epoch", lambda: job.fit(within))


def kill(_: Any, step: int) -> None:
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(_: Any, step: int) -> None:
    if step == 2:
        raise LookupError("no table of labels")


def sleep(_: Any, step: int) -> None:
    if step == 2:
        time.sleep(8)


def lost(call: Callable[[Any, int], None], worker: int) -> Callable[[Job], None]:
    """A worker that leaves in the middle of an epoch."""

    def scenario(job: Job) -> None:
        callback = Calls("on_train_batch_begin", call, only=worker)
        try:
            job.record("fit", lambda: job.fit(callback))
        except LookupError as error:
            job.found["own error"] = str(error)

    return scenario


SCENARIOS = {
    "together": together,
    "killed": lost(kill, 1),
    "chief killed": lost(kill, 0),
    "failed": lost(fail, 1),
    "late": lost(sleep, 1),
}


def main(name: str, folder: Path, without: list[str]) -> None:
    repairs = enable_multi_worker(without=without, timeout=30)
    job = Job(folder)
    if name == "late":  # and not before: a busy machine may be slow at the start
        repairs.timeout = 4
    try:
        SCENARIOS[name](job)
    except BaseException:  # noqa: BLE001 - reported, and the process ended
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    (folder / f"{name}{WORKER}.json").write_text(json.dumps(job.found))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
