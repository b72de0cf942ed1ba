"""`recalibrate` in the processes of a group, each with its own part of the data."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.harness import numbers
from tests.recalibration import (
    FEATURES,
    TIMES,
    assert_population,
    data,
    expected,
    held,
    make_model,
    state_of,
)
from tests.replicas.torch import POOL

import syncbn
from syncbn.recalibration import recalibrate

BATCHES = data((16, 11, 6))
NO_ROWS = np.zeros((0, TIMES, FEATURES), "float32")
# What each of two processes has: uneven parts, one of them none at last; or nothing at all.
SHARES = {
    "uneven": ([BATCHES[0][:5], BATCHES[1]], [BATCHES[0][5:], NO_ROWS, BATCHES[2]]),
    "fewer": ([BATCHES[0][:5]], [BATCHES[0][5:], BATCHES[1], BATCHES[2]]),
    "nothing": ([], BATCHES),
}


class Rows(torch.utils.data.IterableDataset):
    """Batches as they are."""

    def __init__(self, batches, error=None):
        super().__init__()
        self.batches, self.error = batches, error

    def __iter__(self):
        yield from ((torch.tensor(batch),) for batch in self.batches)
        if self.error is not None:
            raise self.error


def loader(batches, error=None):
    return torch.utils.data.DataLoader(Rows(batches, error), batch_size=None)


def on_rank(batches, error=None, grouped=False):
    group = dist.new_group([0, 1]) if grouped else None
    first = syncbn.SyncBatchNormalization(dtype="float64", name="first", process_group=group)
    second = syncbn.SyncBatchNormalization(dtype="float64", name="second", process_group=group)
    model = make_model(first=first, second=second) if grouped else make_model()
    before = state_of(model)
    try:
        report = recalibrate(model, loader(batches, error))
    except (OSError, syncbn.WorkerError) as raised:
        assert state_of(model) == before
        return f"{type(raised).__name__}: {raised}"
    statistics = [one.tobytes() for pair in held(model) for one in pair]
    return report, statistics, held(model)


@pytest.mark.parametrize("shares", SHARES)
def test_processes_give_what_one_device_gives_and_hold_the_same_bits(shares):
    results = POOL.run(on_rank, [(own, None, shares == "fewer") for own in SHARES[shares]])
    (report, bits, _), (other, others, _) = results
    assert bits == others
    assert report == other
    assert report.steps == 3
    model = make_model()
    layers = (model.get_layer("first"), model.get_layer("second"))
    for layer, (mean, variance) in zip(layers, results[0][2], strict=True):
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(variance)
    assert_population(model, expected(BATCHES), 1e-11)


def test_a_process_whose_data_fails_ends_both_and_changes_nothing():
    arguments = [([BATCHES[0][:5]], None), ([BATCHES[0][5:]], OSError("the disk is gone"))]
    waiting, failing = POOL.run(on_rank, arguments)
    assert failing.startswith("OSError: the disk is gone")
    assert waiting.startswith("WorkerError: Recalibration requires the data of every process.")
    assert "process 1 failed while it made its own: OSError: the disk is gone" in waiting


def test_one_process_alone_takes_a_data_loader():
    model = make_model()
    recalibrate(model, loader(BATCHES))
    assert_population(model, expected(BATCHES), 1e-11)
    assert np.isfinite(numbers(model(BATCHES[0], training=False))).all()
