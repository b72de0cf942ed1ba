"""Training on ragged batches: the same runs on one device, on many, and on several processes.

As a program it is one of several processes: `python -m tests.ragged_training PORT RANK CASE...`;
it prints a line of JSON for each case.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NamedTuple

ROWS = 65
# Rows of each process's batches. What all processes bring at a step is one batch of one device.
CASES: dict[str, tuple[tuple[int, ...], ...]] = {
    "8 and 7 rows": ((8, 8), (8, 7)),
    "7 and 8 rows": ((8, 7), (8, 8)),
    "15 and 1 rows": ((8, 15), (8, 1)),
    "a batch less": ((8, 8, 7), (8,)),
    "nothing": ((8, 5), ()),
}


class Outcome(NamedTuple):
    """What a run gives, as it is written to JSON."""

    history: dict[str, list[float]]
    evaluated: dict[str, float]
    weights: list[Any]


def data() -> tuple[Any, Any]:
    """Inputs whose rows differ in mean and scale, so that any wrong set of rows shows."""
    import numpy as np

    rng = np.random.default_rng(7)
    scale = np.linspace(1, 3, ROWS)[:, None]
    x = (rng.normal(size=(ROWS, 6)) * scale + scale).astype("float32")
    return x, np.sin(x[:, :1] * x[:, 1:2] + rng.normal(size=(ROWS, 1))).astype("float32")


def make_model(**arguments: Any) -> Any:
    """Two kinds of batch normalization, a loss and a metric that counts every row the same."""
    import keras

    import syncbn

    keras.utils.set_random_seed(3)
    layers = [
        keras.layers.Dense(5, activation="tanh"),
        keras.layers.BatchNormalization(momentum=0.8),
        keras.layers.Dense(4, activation="tanh"),
        syncbn.SyncBatchNormalization(momentum=0.8),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((6,)), *layers])
    optimizer = keras.optimizers.SGD(0.02, momentum=0.9)
    model.compile(optimizer, "mse", metrics=["mae"], **arguments)
    return model


def rows_of(case: str, process: int) -> list[slice]:
    """The rows of each batch of one process: the case's processes take turns at the data."""
    parts, start, own = CASES[case], 0, []
    for step in range(max(map(len, parts))):
        for number, sizes in enumerate(parts):
            rows = sizes[step] if step < len(sizes) else 0
            if number == process and rows:
                own.append(slice(start, start + rows))
            start += rows
    return own


def batches_of(case: str, processes: range) -> list[tuple[Any, Any]]:
    """What these processes bring, one batch a step."""
    import numpy as np

    x, y = data()
    own = [rows_of(case, process) for process in processes]
    indices = [
        np.concatenate([np.arange(ROWS)[rows[step]] for rows in own if step < len(rows)])
        for step in range(max(map(len, own)))
    ]
    return [(x[rows], y[rows]) for rows in indices]


def as_dataset(batches: list[Any], fault: Any = None) -> Any:
    """Batches that can be had again and again."""
    import keras

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, index: int) -> Any:
            if fault is not None and index == 1:
                fault()
            return batches[index]

    return Batches()


def train(model: Any, dataset: Any, **arguments: Any) -> Outcome:
    """Two epochs in order, then an evaluation."""
    history = model.fit(dataset, epochs=2, shuffle=False, verbose=0, **arguments).history
    evaluated = model.evaluate(dataset, verbose=0, return_dict=True)
    return Outcome(history, evaluated, [weight.tolist() for weight in model.get_weights()])


def recalibrated(dataset: Any) -> Outcome:
    """The weights of a model with the statistics of the data."""
    from syncbn.recalibration import recalibrate

    model = make_model()
    recalibrate(model, dataset)
    return Outcome({}, {}, [weight.tolist() for weight in model.get_weights()])


def assert_equal(found: Outcome, expected: Outcome, tolerance: float = 1e-6) -> None:
    """Histories, evaluation and all weights, relative to the larger of 1 and what is expected."""
    import numpy as np

    for name, values in expected.history.items():
        np.testing.assert_allclose(found.history[name], values, rtol=tolerance, err_msg=name)
    for name, value in expected.evaluated.items():
        np.testing.assert_allclose(found.evaluated[name], value, rtol=tolerance, err_msg=name)
    for one, other in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def _fail() -> None:
    raise OSError("the disk is gone")


def _die() -> None:
    os._exit(9)


FAULTS = {"fails": _fail, "dies": _die}


def _run(case: str, rank: int) -> Any:
    import syncbn

    name, _, how = case.partition(", ")
    batches = batches_of(name, range(rank, rank + 1)) if rows_of(name, rank) else []
    fault = FAULTS.get(how) if rank == 1 else None
    dataset = as_dataset(batches, fault)
    if how == "recalibrated":
        return recalibrated(dataset)._asdict()
    if how == "arrays":
        import numpy as np

        x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
        dataset = syncbn.distribute_dataset(x, y, batch_size=8, timeout=60)
    elif how != "as it is":
        dataset = syncbn.distribute_dataset(dataset, timeout=10 if how in FAULTS else 60)
    return train(make_model(), dataset)._asdict()


def main() -> None:
    """One process: its cases in turn, a line each."""
    port, rank, *cases = sys.argv[1:]
    import keras

    keras.distribution.initialize(f"127.0.0.1:{port}", 2, int(rank))
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    for case in cases:
        try:
            result = _run(case, int(rank))
        except Exception as error:  # noqa: BLE001 - the test reads what it was
            result = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT", json.dumps([case, result]), flush=True)
        if "error" in result:
            os._exit(0)  # JAX's own way out waits for the other process


if __name__ == "__main__":
    main()
