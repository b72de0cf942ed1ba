"""Numbers of collectives that come again on workers: also after steps that end by an error."""

import json
import sys

import pytest

from tests.multiprocess.cluster import run_processes, run_workers

pytestmark = pytest.mark.multiprocess
SCRIPT = "tests.multiprocess.workers.again"


def assert_right_on_two_workers(rounds, timeout):
    outputs = run_workers(SCRIPT, 2, ["repaired", str(rounds)], timeout=timeout)
    one, another = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert one == another
    assert one["right"] == 2 * rounds
    assert one["came_again"]


@pytest.mark.survival
def test_two_workers_that_come_apart_sum_alike_and_end_their_data():
    assert_right_on_two_workers(120, timeout=60)


@pytest.mark.survival
def test_two_workers_do_so_for_thousands_of_steps():
    assert_right_on_two_workers(3000, timeout=300)


@pytest.mark.survival
def test_sums_that_do_not_wait_for_the_data_break_off():
    """What the others guard against: workers that wait for ever, or aborted collectives."""
    command = [sys.executable, "-m", SCRIPT, "early", "3000"]
    ended = run_processes(command, 2, timeout=120, grace=20.0)
    assert all(one.status != 0 for one in ended)
    words = ("Second consumer", "Timeout (", "ollective ops is aborted")
    assert any(word in one.output for one in ended for word in words)
