"""Parts of unequal size on two processes, and numbers of batches that differ."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.multiprocess.cluster import free_ports
from tests.ragged_training import (
    Outcome,
    as_dataset,
    assert_equal,
    batches_of,
    make_model,
    recalibrated,
    train,
)

ROOT = Path(__file__).parents[2]
SECONDS = 240
# Devices of a process, and what both run one after the other.
RUNS = {
    1: (
        "8 and 7 rows, as it is",
        "7 and 8 rows",
        "a batch less, arrays",
        "a batch less, recalibrated",
    ),
    2: ("8 and 7 rows", "15 and 1 rows", "a batch less", "nothing"),
}


def run(devices, *cases):
    """What each of two processes prints for each case."""
    (port,) = free_ports(1)
    environment = os.environ | {
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tests.ragged_training", str(port)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), *cases],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        printed = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)  # JAX catches the gentler ones
            process.wait()
    return [
        dict(json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT "))
        for text in printed
    ]


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, id="2x1"), pytest.param(2, id="2x2", marks=pytest.mark.frameworks)],
)
def results(request):
    return RUNS[request.param], run(request.param, *RUNS[request.param])


@pytest.mark.frameworks
def test_two_processes_train_as_one_device(results):
    cases, found = results
    for case in cases:
        name, _, how = case.partition(", ")
        whole = as_dataset(batches_of(name, range(2)))
        expected = recalibrated(whole) if how == "recalibrated" else train(make_model(), whole)
        for of_process in found:
            outcome = Outcome(**of_process[case])
            if how == "as it is":  # Keras alone: silently another model, and not even the same
                with pytest.raises(AssertionError):
                    assert_equal(outcome, expected, 1e-3)
            else:
                assert_equal(outcome, expected)
        same = found[0][case]["weights"] == found[1][case]["weights"]
        assert same == (how != "as it is"), case


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("how", "why"), [("fails", "Process 1 failed.*OSError: the disk is gone"), ("dies", "Nothing")]
)
def test_a_process_that_is_lost_in_its_data_is_named(how, why):
    found = run(1, f"8 and 7 rows, {how}")
    error = found[0][f"8 and 7 rows, {how}"]["error"]
    assert error.startswith("WorkerError")
    assert "rocess 1" in error
    assert re.search(why, error)
