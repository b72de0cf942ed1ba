"""Nobody waits for ever: for a worker that never comes, nor in a loop of the user's own."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.multiprocess.cluster import run_workers

pytestmark = [pytest.mark.multiprocess, pytest.mark.survival]
# By the worker that ends by SIGKILL.
KILLED = {"killed": 1, "stopped": 1}
# The others are as likely, but cost as much again.
CORE = ("missing worker", "ended", "late", "stopped", "export")
MORE = ("missing chief", "killed", "chief ended")


def run_all(folder, names):
    """What every worker that lived wrote. Mostly they wait, so that several run at a time."""

    def run(name):
        script = "tests.multiprocess.workers.waiting"
        run_workers(script, 2, [name, str(folder)], timeout=100, killed=KILLED.get(name))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, names))
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("waiting"), CORE)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("waiting"), MORE)


@pytest.fixture
def found(name, request):
    return request.getfixturevalue("core" if name in CORE else "more")


def case(name, here=0):
    """The worker that lives, and when it is run."""
    marks = [pytest.mark.survival] if name in MORE else []
    return pytest.param(name, here, id=name, marks=marks)


@pytest.mark.parametrize(("name", "here"), [case("missing worker"), case("missing chief", 1)])
def test_a_worker_that_never_comes_is_named_by_number_and_address(found, name, here):
    result = found[f"{name}{here}"]
    assert result["type"] == "WorkerError"
    assert f"Received: worker {1 - here} (127.0.0.1:" in result["error"]
    assert "did not come in 3 s" in result["error"]
    assert f"This is worker {here} (" in result["error"]
    assert 3 <= result["seconds"] < 6


@pytest.mark.parametrize(("name", "here"), [case("ended"), case("killed"), case("chief ended", 1)])
def test_a_custom_loop_does_not_wait_for_a_worker_that_is_gone(found, name, here):
    """It is named; where TensorFlow comes first with its own error, by its task."""
    result = found[f"{name}{here}"]
    gone = 1 - here
    names = f"worker {gone} (127.0.0.1:", f"/task:{gone}"
    assert any(name in result["error"] for name in names), result
    assert result["seconds"] < 8


def test_a_custom_loop_names_a_live_worker_that_is_in_no_collective(core):
    result = core["late0"]
    assert "worker 1 (127.0.0.1:" in result["error"]
    assert "is late, last seen at line " in result["error"]
    assert "of waiting.py, in no collective for 3 s" in result["error"]
    assert 3 <= result["seconds"] < 8


def test_a_stopped_worker_is_named_in_fit(core):
    result = core["stopped0"]
    assert result["type"] == "WorkerError"
    assert "worker 1 (127.0.0.1:" in result["error"]
    assert result["seconds"] < 10


def test_a_chief_that_works_on_after_the_others_have_ended_is_not_disturbed(core):
    assert core["export0"].keys() == {"seconds"}
    assert core["export0"]["seconds"] > 3
