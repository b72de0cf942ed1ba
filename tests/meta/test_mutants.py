"""The suite can fail: with each defect of `tests/mutants.py` the contract's tests do."""

import importlib
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tests.mutants import MUTANTS

ROOT = Path(__file__).parents[2]

CONTRACT = "tests/contract"
TENSORFLOW = "tests/tensorflow"
EQUIVALENCE = (
    f"{CONTRACT}/test_equivalence.py::test_any_split_of_the_batch_gives_what_one_device_gives"
)
VARIANCE = f"{CONTRACT}/test_precision.py::test_variance_at_a_large_mean"
COUNT = (
    f"{TENSORFLOW}/test_collectives.py"
    "::test_one_collective_forward_and_one_backward_on_each_replica"
)
FEATURES = f"{CONTRACT}/test_features.py::test_a_feature_gives_what_one_device_gives"
GARBAGE = f"{CONTRACT}/test_masks.py::test_what_is_in_a_masked_position_changes_nothing_elsewhere"
MASKED_OUT = f"{CONTRACT}/test_masks.py::test_nothing_but_masked_elements_moves_nothing"
# A few tests a mutant, of those that must notice it; each of them passes without it.
NOTICED_BY = {
    "empty_batches_count": [f"{MASKED_OUT}[2-0.9-options1]", f"{MASKED_OUT}[1-None-options3]"],
    "equal_weights": [f"{EQUIVALENCE}[uneven-float32]", f"{EQUIVALENCE}[one against many-float64]"],
    "folded_sum_of_squares": [f"{VARIANCE}[1000.0-0.0001]"],
    "groups_move_apart": [f"{FEATURES}[groups-uneven-graph]"],
    "mask_is_a_factor": [f"{GARBAGE}[nan-graph]", f"{GARBAGE}[inf-eager]"],
    "masked_is_local": [
        f"{FEATURES}[mask-uneven-graph]",
        f"{FEATURES}[weights-three-eager]",
    ],
    "local_backward": [f"{EQUIVALENCE}[equal-float32]", f"{EQUIVALENCE}[uneven-float64]"],
    "never_synchronizes": [
        f"{EQUIVALENCE}[equal-float32]",
        f"{EQUIVALENCE}[uneven-float32]",
        f"{EQUIVALENCE}[one replica empty-float64]",
        f"{COUNT}[2]",
    ],
    "two_collectives": [f"{COUNT}[2]", f"{COUNT}[4]"],
    "weights_are_a_mask": [f"{FEATURES}[weights-uneven-graph]"],
}


# Here; all by `make test-frameworks`: each is a process that starts anew.
ALWAYS = ("local_backward", "never_synchronizes")


def marks_of(mutant, backend="tensorflow"):
    few = ALWAYS if backend == "tensorflow" else ()
    return () if mutant in few else pytest.mark.frameworks


def others():
    for backend in ("jax", "torch"):
        module = importlib.import_module(f"tests.{backend}.mutants")
        for mutant, tests in module.NOTICED_BY.items():
            marks = marks_of(mutant, backend)
            yield pytest.param(backend, mutant, tests, marks=marks, id=f"{backend}-{mutant}")


def outcomes(tests, mutant, report, backend="tensorflow", **environment):
    """The failure message of each test, None where it passed."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests],
        cwd=ROOT,
        env={
            **os.environ,
            "SYNCBN_MUTANT": mutant,
            "KERAS_BACKEND": backend,
            "SYNCBN_EVERY_CASE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) == len(tests), result.stdout
    messages = []
    for case in cases:
        assert case.find("error") is None, result.stdout
        failure = case.find("failure")
        messages.append(None if failure is None else failure.get("message"))
    return messages


@pytest.mark.parametrize("mutant", [pytest.param(m, marks=marks_of(m)) for m in MUTANTS])
def test_the_suite_fails_with_the_mutant(mutant, tmp_path):
    messages = outcomes(NOTICED_BY[mutant], mutant, tmp_path / "report.xml")
    # By the check's own assertion: a mutant that merely crashes proves nothing.
    assert all(message and "assert" in message.lower() for message in messages), messages


@pytest.mark.parametrize(("backend", "mutant", "tests"), [*others()])
def test_the_suite_fails_on_another_backend_with_the_mutant(backend, mutant, tests, tmp_path):
    messages = outcomes(tests, mutant, tmp_path / "report.xml", backend)
    assert all(message and "assert" in message.lower() for message in messages), messages


@pytest.mark.frameworks
@pytest.mark.parametrize("mutant", ["", "never_synchronizes"])
def test_the_suite_fails_with_tf_keras_too_if_nobody_synchronizes(mutant, tmp_path):
    fit = "tests/tf_keras/test_fit.py::test_fit_on_replicas_gives_what_one_device_gives[float64]"
    count = "tests/tf_keras/test_layer.py::test_a_step_has_a_collective_each_way_and_frozen_none"
    tests = [f"{EQUIVALENCE}[uneven-float32]", fit, f"{count}[True]"]
    messages = outcomes(tests, mutant, tmp_path / "report.xml", SYNCBN_KERAS="tf_keras")
    assert [bool(message and "assert" in message.lower()) for message in messages] == [
        bool(mutant)
    ] * len(tests), messages


@pytest.mark.frameworks
def test_the_same_tests_pass_without_a_mutant(tmp_path):
    tests = sorted({test for tests in NOTICED_BY.values() for test in tests})
    assert outcomes(tests, "", tmp_path / "report.xml") == [None] * len(tests)
