"""A worker of MultiWorkerMirroredStrategy: its part of each case, and what it observed, as .npz."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
import tensorflow as tf

import syncbn
from syncbn.recalibration import recalibrate
from tests import recalibration
from tests.harness import make_case
from tests.multiprocess.workers.cases import CASES
from tests.replicas.tensorflow import prepare, take


def message_of_a_nan_on_the_second_worker(strategy: tf.distribute.Strategy) -> str:
    case = make_case([(5, 4), (6, 4)])._replace(options={"nan_check": True})
    case.parts[1][2, 3] = np.nan
    try:
        take(prepare(case, strategy=strategy, unknown_sizes=False))
    except tf.errors.InvalidArgumentError as error:
        return str(error)
    return "nothing was found"


def recalibrated(strategy: tf.distribute.Strategy) -> dict[str, np.ndarray]:
    """What the layers of a model hold then, without and with the repairs of Keras's training.

    The last batch has one example, so that one worker has none.
    """
    found = {}
    batches = recalibration.data()
    for repaired in (False, True):
        with syncbn.enable_multi_worker() if repaired else contextlib.nullcontext():
            with strategy.scope():
                model = recalibration.make_model()
            recalibrate(model, np.concatenate(batches), batch_size=9)
            for layer, statistics in enumerate(recalibration.held(model)):
                for name, values in zip(("mean", "variance"), statistics, strict=True):
                    found[f"recalibrated/{repaired}/{layer}/{name}"] = values
    return found


def main(folder: Path) -> None:
    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=tf.distribute.experimental.CommunicationOptions(
            implementation=tf.distribute.experimental.CommunicationImplementation.RING,
            timeout_seconds=60,
        )
    )
    worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    assert strategy.num_replicas_in_sync == 2, strategy.num_replicas_in_sync
    arrays = {}
    for name, (case, mode) in CASES.items():
        prepared = prepare(case, strategy=strategy, mode=mode, unknown_sizes=False)
        for field, values in take(prepared)._asdict().items():
            if field != "weights":  # of all names; the others are of one
                (arrays[f"{name}/{field}"],) = values
        if mode == "graph":
            graph = prepared.run.get_concrete_function(**prepared.values).graph
            reduces = [op for op in graph.get_operations() if op.type.startswith("Collective")]
            arrays[f"{name}/collectives"] = np.array(len(reduces))
    arrays["stopped"] = np.array(message_of_a_nan_on_the_second_worker(strategy))
    arrays |= recalibrated(strategy)
    np.savez(folder / f"worker{worker}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
