"""The table of versions, row by row, against what a version was seen to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from syncbn.doctor import table
from syncbn.doctor.verdict import TriedLayer

# What was seen of a version: `tried` and `refused` by the doctor's probe, `argument` and
# `experimental` by tests/doctor_facts.py, `fit` whether two workers' ended well, or None.
Facts = dict[str, Any]


def _native(facts: Facts, case: str) -> Iterator[dict[str, Any]]:
    for layer in facts["tried"]:
        if layer.role == "native":
            yield layer.cases[case]


def _plain(facts: Facts) -> TriedLayer:
    return next(layer for layer in facts["tried"] if layer.role == "plain")


def _saved_by_replica_0(facts: Facts) -> bool:
    case = _plain(facts).cases["equal parts"]
    return case["moving_spread"] > 1 and case["moving_read_error"] > 1


def _keeps(facts: Facts, name: str) -> bool:
    return facts[name] is None or facts[name]["kept"]


# How each defect shows. Those that are not here need GPUs, or old files.
SHOWS: dict[str, Callable[[Facts], bool]] = {
    "mask-ignored": lambda facts: any(
        case["by"] == "global, mask ignored" for case in _native(facts, "masked")
    ),
    "mask-miscounted": lambda facts: any(
        case["by"] == "neither" for case in _native(facts, "masked")
    ),
    "mask-local": lambda facts: any(case["by"] == "local" for case in _native(facts, "masked")),
    "unequal-sizes": lambda facts: any(
        case["by"] != "global" for case in _native(facts, "unequal parts")
    ),
    "large-mean-nan": lambda facts: any(
        case["error"] is None for case in _native(facts, "large mean")
    ),
    "large-mean": lambda facts: any(
        case["error"] is not None and case["by"] != "global"
        for case in _native(facts, "large mean")
    ),
    "lost-on-save": lambda facts: not _keeps(facts, "argument"),
    "fit-multi-worker": lambda facts: not facts["fit"],
    "moving-statistics-of-replica-0": _saved_by_replica_0,
}
NOT_SHOWN_HERE = {
    "nccl-order",  # several GPUs
    "old-checkpoints",  # tests/contract/test_checkpoints.py has files of each version
    "experimental-gone",  # in the row of what there is
    "refused-elsewhere",  # the same
    "local-elsewhere",  # JAX's alone, which has no others
    "local-processes",  # torch's alone
}


def departures(subject: table.Subject, facts: Facts) -> list[str]:
    """Where the table and what was seen do not agree, in words."""
    (row,) = table.read().rows_of(subject)
    found = []
    for name, written in (
        ("argument", "BatchNormalization(synchronized=True)"),
        ("experimental", "SyncBatchNormalization()"),
    ):
        named = [layer for layer in row.native if layer.endswith(written)]
        deprecated = bool(named) and named[0] in row.deprecated
        if bool(named) != (facts[name] is not None):
            found.append(f"the table has {named} and it has {facts[name]}")
        elif named and deprecated != facts[name]["deprecated"]:
            found.append(f"{named}: deprecated: {deprecated} in the table, seen: {facts[name]}")
    if not row.native:
        return found
    known = {defect.name for defect in table.read().defects_of(subject)}
    for name, shows in SHOWS.items():
        if name == "fit-multi-worker" and facts["fit"] is None:
            continue
        if shows(facts) != (name in known):
            found.append(f"{name}: in the table: {name in known}, seen: {shows(facts)}")
    if not all(case["by"] == "global" for case in _native(facts, "equal parts")):
        found.append("the native layer does not synchronize at all")
    return found
