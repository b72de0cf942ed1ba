"""Keras's own training on JAX: compiled or not, on several devices, in several processes."""

import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from tests.jax.fit_worker import BATCH, data, trained
from tests.replicas.jax import distributed

WORKER = Path(__file__).parent / "fit_worker.py"


def whole():
    return [array.reshape(-1, *array.shape[2:]) for array in data()]


@pytest.fixture(scope="module")
def one_device():
    return trained(*whole(), BATCH)


def assert_same(weights, expected, tolerance=2e-6):
    for own, its in zip(weights, expected, strict=True):
        np.testing.assert_allclose(own, its, rtol=tolerance, atol=tolerance)


def test_one_device_trains_as_with_keras_own_layer(one_device):
    plain = trained(*whole(), BATCH, layer_class=keras.layers.BatchNormalization)
    assert_same(one_device, plain)


def test_fit_without_jit_is_the_same(one_device):
    # XLA rounds elsewhere where it compiles operation by operation.
    assert_same(trained(*whole(), BATCH, jit_compile=False), one_device, 1e-5)


@pytest.mark.parametrize("context", ["data parallel", "model parallel"])
def test_fit_under_a_distribution_equals_one_device(one_device, context):
    with distributed(context, 4):
        assert_same(trained(*whole(), BATCH), one_device)


@pytest.mark.frameworks
def test_fit_under_a_distribution_without_jit_equals_one_device(one_device):
    with distributed("data parallel", 4):
        assert_same(trained(*whole(), BATCH, jit_compile=False), one_device, 1e-5)


def free_address():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_processes_train_as_one_device_and_hold_the_same_bits(one_device, tmp_path):
    address = free_address()
    files = [tmp_path / f"{index}.npz" for index in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(file), address, "2", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        for index, file in enumerate(files)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            # JAX takes SIGTERM for a notice to come to an end soon, and goes on.
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    weights = [list(np.load(file).values()) for file in files]
    for own, its in zip(*weights, strict=True):
        assert own.tobytes() == its.tobytes()
    assert_same(weights[0], one_device)
