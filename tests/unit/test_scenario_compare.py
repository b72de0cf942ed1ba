"""The comparison of a world with one device sees what is wrong."""

import numpy as np
import pytest
from tests.scenarios import compare
from tests.scenarios.results import error_array
from tests.scenarios.scenario import SCENARIOS, Scenario

RIGHT = {"weight": np.array([1.0, 2.0]), "words": np.array(["a"])}


@pytest.fixture(autouse=True)
def _scenarios(monkeypatch):
    table = {
        "trains": Scenario("trains", lambda _: {}),
        "raises": Scenario("raises", lambda _: {}, error=("InputError", "scope")),
    }
    for name, entry in table.items():
        monkeypatch.setitem(SCENARIOS, name, entry)


def verdict(*observed, job="trains", world="workers2x1"):
    return compare.judge(job, world, list(observed), RIGHT)


def test_equal_results_are_the_same():
    assert verdict(RIGHT, RIGHT).same


@pytest.mark.parametrize(
    "wrong",
    [
        {**RIGHT, "weight": np.array([1.0, 2.001])},
        {**RIGHT, "weight": np.array([1.0, np.nan])},
        {**RIGHT, "weight": np.array([1.0])},
        {**RIGHT, "words": np.array(["b"])},
        {"weight": RIGHT["weight"]},
        {**RIGHT, "further": np.zeros(1)},
        error_array("ValueError", "no"),
    ],
    ids=["number", "nan", "shape", "word", "missing", "further", "error"],
)
def test_one_worker_that_differs_is_seen(wrong):
    assert not verdict(RIGHT, wrong).same
    assert not verdict(wrong, RIGHT).same


def test_an_expected_error_must_be_raised_by_every_worker_in_those_words():
    right = error_array("InputError", "compile in the scope")
    assert verdict(right, right, job="raises").same
    assert not verdict(right, RIGHT, job="raises").same
    assert not verdict(right, error_array("InputError", "no"), job="raises").same
    assert not verdict(right, error_array("Peer", "the scope"), job="raises").same
