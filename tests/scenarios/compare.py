"""Whether what a world gave is what one device gave."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from tests.scenarios.results import Observed, error_of
from tests.scenarios.scenario import SCENARIOS, Scenario
from tests.scenarios.world import WORLDS

__all__ = ["Verdict", "judge"]


class Verdict(NamedTuple):
    """`same`: whether it is right. `words`: of a row of the table."""

    same: bool
    words: str


def judge(job: str, world: str, observed: list[Observed], reference: Observed) -> Verdict:
    """Compare what each worker observed with one device, or its error with that expected.

    Args:
        job: the scenario's name.
        world: where it was observed.
        observed: one a worker.
        reference: by one device.
    """
    entry = SCENARIOS[job.split("@")[0]]
    errors = [error_of(one) for one in observed]
    if entry.error is not None and world in entry.error_worlds:
        return _judge_errors(entry, errors)
    # That of the worker that failed by itself, if there is one.
    failed = sorted((e for e in errors if e is not None), key=lambda e: e[0] == "Peer")
    if failed:
        kind, message = failed[0]
        return Verdict(False, f"error: {kind}: {_first_line(message)}")
    if (error := error_of(reference)) is not None:
        return Verdict(False, f"error on one device: {error[0]}: {_first_line(error[1])}")
    worst = Verdict(True, "same, 0")
    largest = 0.0
    for worker, one in enumerate(observed):
        where = f" on worker {worker}" if WORLDS[world].workers > 1 else ""
        if one.keys() != reference.keys():
            odd = sorted(one.keys() ^ reference.keys())
            return Verdict(False, f"differs: only one of them has {odd[:3]}{where}")
        for name, array in one.items():
            difference = distance(array, reference[name])
            if not difference <= largest:
                largest = difference
                same = difference <= entry.tolerance
                words = f"{'same' if same else 'differs'}, {difference:.1e} in {name}{where}"
                worst = Verdict(same, words)
                if not np.isfinite(difference):
                    return worst
    return worst


def _judge_errors(entry: Scenario, errors: list[tuple[str, str] | None]) -> Verdict:
    """Every worker must say it: none is left waiting."""
    kind, words = entry.error or ("", "")
    for worker, error in enumerate(errors):
        if error is None:
            return Verdict(False, f"no error on worker {worker}, expected {kind}")
        if error[0] != kind or not re.search(words, error[1]):
            return Verdict(False, f"another error: {error[0]}: {_first_line(error[1])}")
    return Verdict(True, f"raises {kind}")


def distance(array: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference relative to the largest reference value; infinite for other shapes."""
    if array.shape != reference.shape:
        return np.inf
    if array.size == 0:
        return 0.0
    if reference.dtype.kind not in "biufc":
        return 0.0 if (array == reference).all() else np.inf
    expected = reference.astype(np.float64)
    found = array.astype(np.float64)
    # What one device finds to be NaN or infinite must be so here.
    usual = np.isfinite(expected)
    if not np.array_equal(found[~usual], expected[~usual], equal_nan=True):
        return np.inf
    if not usual.any():
        return 0.0
    scale = np.abs(expected[usual]).max() or 1.0
    difference = float(np.abs(found[usual] - expected[usual]).max() / scale)
    return np.inf if np.isnan(difference) else difference


def _first_line(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return (lines[0] if lines else "")[:160]
