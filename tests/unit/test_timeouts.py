"""Where the timeout comes from, and the meeting of the workers before TensorFlow starts."""

import socket
import threading

import pytest
from tests.multiprocess.cluster import free_ports

import syncbn
from syncbn.errors import InputError, WorkerError
from syncbn.multi_worker.meeting import meet


@pytest.mark.parametrize("text", ["", "soon", "0", "-3", "nan", "inf"])
def test_an_environment_without_a_positive_timeout_is_refused_by_its_name(monkeypatch, text):
    monkeypatch.setenv("SYNCBN_TIMEOUT", text)
    with pytest.raises(InputError, match="SYNCBN_TIMEOUT requires seconds"):
        syncbn.enable_multi_worker()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_an_argument_that_is_no_time_is_refused(timeout):
    with pytest.raises(InputError, match="`timeout` requires seconds"):
        syncbn.enable_multi_worker(timeout=timeout)


def test_the_argument_wins_over_the_environment_and_that_over_the_default(monkeypatch):
    monkeypatch.delenv("SYNCBN_TIMEOUT", raising=False)
    with syncbn.enable_multi_worker() as repairs:
        assert repairs.timeout == 120
    monkeypatch.setenv("SYNCBN_TIMEOUT", "7.5")
    with syncbn.enable_multi_worker() as repairs:
        assert repairs.timeout == 7.5
    with syncbn.enable_multi_worker(timeout=3) as repairs:
        assert repairs.timeout == 3
        # A library that calls it again without one does not ask for another.
        with syncbn.enable_multi_worker() as again:
            assert again is repairs
        with pytest.raises(InputError, match="timeout=4"):
            syncbn.enable_multi_worker(timeout=4)


def outcomes(addresses, timeouts):
    """What meeting gives each worker, None for nothing wrong; a timeout of None: it never comes."""
    results = {}

    def run(index, timeout):
        try:
            results[index] = meet(addresses, index, timeout)
        except WorkerError as error:
            results[index] = str(error)

    threads = [
        threading.Thread(target=run, args=(index, timeout))
        for index, timeout in enumerate(timeouts)
        if timeout is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@pytest.fixture
def addresses():
    return [f"127.0.0.1:{port}" for port in free_ports(3)]


def test_all_that_come_go_on_and_their_ports_are_free(addresses):
    assert outcomes(addresses, [10, 10, 10]) == {0: None, 1: None, 2: None}
    for address in addresses:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()


def test_everyone_who_came_is_told_who_is_missing(addresses):
    found = outcomes(addresses, [1.0, 10, None])
    assert found.keys() == {0, 1}
    for error in found.values():
        assert f"Received: worker 2 ({addresses[2]}) did not come in" in error


def test_a_chief_that_never_comes_is_named(addresses):
    found = outcomes(addresses, [None, 0.5, 0.5])
    for index in (1, 2):
        assert f"Received: worker 0 ({addresses[0]}) did not come in 0.5 s" in found[index]


def test_a_port_that_is_taken_is_named(addresses):
    with (
        socket.create_server(("", int(addresses[1].rpartition(":")[2]))),
        pytest.raises(WorkerError, match=r"Received: worker 1 .* End the process"),
    ):
        meet(addresses, 1, 1.0)


def test_strangers_at_the_chiefs_port_do_not_count(addresses):
    port = int(addresses[0].rpartition(":")[2])
    results = {}
    chief = threading.Thread(target=lambda: results.update(outcomes(addresses[:2], [8, None])))
    chief.start()
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"syncbn worker 0\n", b"syncbn worker 7\n"):
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port), timeout=2)
                break
            except OSError:
                continue
        with stranger:
            stranger.sendall(words)
    meet(addresses[:2], 1, 8)
    chief.join(20)
    assert results == {0: None}
