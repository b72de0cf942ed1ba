"""A worker of MultiWorkerMirroredStrategy: its part of each case, and what it observed, as .npz."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
import tensorflow as tf

from tests.harness import local_results, make_case, make_layer, make_step, per_replica
from tests.multiprocess.workers.cases import CASES


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
    for name, (shapes, dtype, mode) in CASES.items():
        case = make_case(shapes, dtype=dtype)
        layer = make_layer(case, strategy, dtype)
        step = make_step(layer)

        def run(x, dy, step=step):
            return strategy.run(step, args=(x, dy))

        run = tf.function(run, autograph=False) if mode == "graph" else run
        x, dy = (per_replica(strategy, values) for values in (case.parts, case.cotangents))
        y, dx, (of_gamma, of_beta) = run(x, dy)
        moving = layer.moving_mean.value, layer.moving_variance.value
        for field, value in zip(
            ("y", "dx", "gamma", "beta", "mean", "variance"),
            (y, dx, of_gamma, of_beta, *moving),
            strict=True,
        ):
            (arrays[f"{name}/{field}"],) = local_results(strategy, value)
        if mode == "graph":
            graph = run.get_concrete_function(x, dy).graph
            reduces = [op for op in graph.get_operations() if op.type.startswith("Collective")]
            arrays[f"{name}/collectives"] = np.array(len(reduces))
    np.savez(folder / f"worker{worker}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
