"""A worker that waits for one that never comes, is gone, sleeps or is stopped; found, as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME, FOLDER = sys.argv[1], Path(sys.argv[2])
WORKER = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
ABSENT = {"missing worker": 1, "missing chief": 0}
if ABSENT.get(NAME) == WORKER:
    sys.exit(0)  # before it can take part in anything

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402 - an absent worker needs none of them
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import syncbn  # noqa: E402

TIMEOUT = 3.0
STEPS = 40
BEGUN: list[float] = []  # when what is looked at began, the last of them
REPAIRS = syncbn.enable_multi_worker(timeout=TIMEOUT if NAME in ABSENT else 60)


def step_of(strategy: Any) -> Callable[[], Any]:
    """A step of a custom loop: one collective."""
    with strategy.scope():
        variable = tf.Variable(tf.ones(3))

    def replica() -> Any:
        return tf.distribute.get_replica_context().all_reduce("sum", variable * 0.5)

    return tf.function(lambda: strategy.run(replica))


def custom_loop(strategy: Any, steps: int) -> None:
    step = step_of(strategy)
    step()
    # Until here a busy machine may be slow without being wrong.
    REPAIRS.timeout = TIMEOUT
    BEGUN.append(time.monotonic())
    for _ in range(steps):
        step()


def loop_and_then(what: Callable[[], Any], who: int = 1) -> Callable[[Any], Any]:
    """That worker's loop is shorter, and then it does something else."""
    return lambda strategy: (
        (custom_loop(strategy, STEPS // 2), what())
        if who == WORKER
        else custom_loop(strategy, STEPS)
    )


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def export(strategy: Any) -> None:
    """After the same steps the chief works on for longer than the timeout, also by TensorFlow."""
    custom_loop(strategy, STEPS)
    deadline = time.monotonic() + 2 * TIMEOUT
    while WORKER == 0 and time.monotonic() < deadline:
        time.sleep(TIMEOUT + 1)
        tf.function(lambda: tf.reduce_sum(tf.random.normal((100,))))()


def fit_with_a_stop(strategy: Any) -> None:
    (FOLDER / f"{NAME}{WORKER}.pid").write_text(str(os.getpid()))

    def stop(batch: int, **_: Any) -> None:
        if WORKER == 1 and batch == 2:
            os.kill(os.getpid(), signal.SIGSTOP)

    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    callback = keras.callbacks.LambdaCallback(on_train_batch_begin=stop)
    x = np.ones((64, 3), "float32")
    model.train_on_batch(x, x[:, :1])
    REPAIRS.timeout = TIMEOUT
    BEGUN.append(time.monotonic())
    model.fit(x, x[:, :1], batch_size=8, verbose=0, callbacks=[callback])


SCENARIOS: dict[str, Callable[[Any], Any]] = {
    "killed": loop_and_then(kill),
    "ended": loop_and_then(sys.exit),
    "chief ended": loop_and_then(sys.exit, who=0),
    "late": loop_and_then(lambda: time.sleep(3 * TIMEOUT)),
    "stopped": fit_with_a_stop,
    "export": export,
}


def main() -> None:
    BEGUN.append(time.monotonic())
    found: dict[str, Any] = {}
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        SCENARIOS[NAME](strategy)
    except (syncbn.WorkerError, tf.errors.OpError) as error:
        found |= {"error": str(error), "type": type(error).__name__}
    found["seconds"] = time.monotonic() - BEGUN[-1]
    (FOLDER / f"{NAME}{WORKER}.json").write_text(json.dumps(found))
    if NAME == "stopped":
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((FOLDER / f"{NAME}1.pid").read_text()), signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
