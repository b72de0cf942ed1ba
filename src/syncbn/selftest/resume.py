"""`resume`: a worker that is killed in the middle of training; the group is started again.

As a program, `python -m syncbn.selftest.resume FOLDER [--kill]`, it is one worker of the training;
`finding` runs it under the launcher, once undisturbed and once with a kill, and compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncbn.selftest.checks import Finding

if TYPE_CHECKING:
    from syncbn.launch import LaunchSettings

__all__ = ["findings", "main"]

EPOCHS = 4
STEPS = 3  # of an epoch
KILLED_IN = 2  # this epoch, from 0, after its first step: the backups are of whole epochs


def findings(settings: LaunchSettings) -> list[Finding]:
    """Launch both trainings on this machine, and compare their weights byte for byte."""
    from syncbn.launch import launch

    with tempfile.TemporaryDirectory(prefix="syncbn-selftest-") as folder:
        results = []
        for name, arguments in (("undisturbed", []), ("killed", ["--kill"])):
            own = Path(folder) / name
            own.mkdir()
            command = [sys.executable, "-m", "syncbn.selftest.resume", str(own), *arguments]
            status = launch(command, dataclasses.replace(settings, max_restarts=len(arguments)))
            results.append(_result(own) if status == 0 else None)
    undisturbed, killed = results
    if undisturbed is None or killed is None:
        return [Finding("trainings that did not end well", results.count(None), 0)]
    return [
        Finding("weights of other bytes", float(undisturbed["weights"] != killed["weights"]), 0),
        # One that begins again from the start comes to the same weights.
        Finding("epochs from where it ought to resume", abs(killed["began"] - KILLED_IN), 0),
        Finding("restarts too few or too many", abs(killed["restarts"] - 1), 0),
    ]


def _result(folder: Path) -> dict[str, Any] | None:
    file = folder / "result.json"
    return dict(json.loads(file.read_text())) if file.exists() else None


def main() -> None:
    """Train as one worker, and leave what came of it in the folder."""
    parser = argparse.ArgumentParser(prog="python -m syncbn.selftest.resume")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", action="store_true", help="the last worker, in its first life")
    parsed = parser.parse_args()
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import syncbn
    from syncbn.selftest.cluster import Cluster

    syncbn.enable_multi_worker()
    cluster = Cluster()
    restarts = int(os.environ.get("SYNCBN_RESTARTS", "0"))
    dies = parsed.kill and restarts == 0 and cluster.worker == cluster.workers - 1
    began, weights = _train(cluster, parsed.folder, dies)
    if cluster.is_chief:
        result = {"began": began, "restarts": restarts, "weights": weights}
        (parsed.folder / "result.json").write_text(json.dumps(result))
    cluster.leave(0)


def _train(cluster: Any, folder: Path, dies: bool) -> tuple[int, str]:
    """The first epoch of this life, and the bytes of all weights."""
    import keras

    from syncbn.selftest.training import data, new_model

    epochs: list[int] = []

    def die(batch: int, *_: Any, **__: Any) -> None:
        if dies and epochs[-1] == KILLED_IN and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    size = 8 * cluster.replicas
    x, y = data(STEPS * size, seed=9)
    model = new_model(cluster)
    model.fit(
        x.astype("float32"),
        y.astype("float32"),
        batch_size=size,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.BackupAndRestore(folder / "backup"),
            keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, *_, **__: epochs.append(epoch),
                on_train_batch_begin=die,
            ),
        ],
    )
    variables = [*model.weights, *model.optimizer.variables]
    return epochs[0], b"".join(variable.numpy().tobytes() for variable in variables).hex()


if __name__ == "__main__":
    main()
