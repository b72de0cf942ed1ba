"""SyncMonitor on two workers: the same values on both, and files by the chief alone."""

import json

import numpy as np
import pytest

from tests.monitoring import assert_logged, expected
from tests.multiprocess.cluster import run_workers

pytestmark = [pytest.mark.multiprocess, pytest.mark.survival]


def test_two_workers_log_the_same_which_is_what_numpy_gives_and_the_chief_writes(tmp_path):
    x = np.random.default_rng(0).normal(size=(24, 5)) + np.linspace(0, 2, 24)[:, None]
    x = x.astype("float32")
    x[20, 1] = np.nan  # on the second worker's part of the last batch
    np.save(tmp_path / "x.npy", x)
    run_workers("tests.multiprocess.workers.monitored", 2, [str(tmp_path)], timeout=200)
    first, second = (json.loads((tmp_path / f"worker{i}.json").read_text()) for i in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert len(list((tmp_path / "logs").iterdir())) == 1
    history, said = first["history"], first["said"]
    assert history["sync/ours/spread"] == [0.0]
    assert history["sync/plain/spread"][0] > 0
    assert history["sync/ours/nan_step"] == [3.0]
    assert any("layer plain: replica 1 of 2 from replica 0" in one for one in said)
    assert any("at training step 3" in one and "on replica 1 of 2" in one for one in said)
    # The last reading saw NaN; the average is that of the first alone.
    wanted = expected(np.split(x[:8], 2))
    for layer in ("ours", "plain"):
        assert (
            f"{layer}: replicas' means lie up to {wanted['mean_distance']:.2g}" in first["report"]
        )
    assert_logged(history, "ours", {"mean_distance": float("nan")})
