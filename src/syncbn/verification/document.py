"""The report as JSON, which gives the same verdict again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from syncbn.errors import InputError
from syncbn.files import written_whole
from syncbn.verification.verdict import (
    Cause,
    Comparison,
    Finding,
    Kind,
    Layer,
    Outcome,
    Verdict,
)

__all__ = ["SCHEMA", "as_dict", "from_dict", "read_json", "write_json"]

# Raised where a field changes its meaning or goes; a new one beside the others leaves it.
SCHEMA = 1
_FORMAT = "syncbn.verify"
_INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf}


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """The verdict as values that JSON has.

    Enumerations are their words. JSON has no NaN and no infinity: a difference that is not a number
    is null, which departs from any tolerance, one without a bound is "Infinity". In settings both
    are null. `agrees` of each comparison, `exit_code` and `first_departure` are for readers;
    `from_dict` works them out again.
    """
    first = verdict.first_departure
    return {
        "format": _FORMAT,
        "schema": SCHEMA,
        "outcome": verdict.outcome.word,
        "exit_code": verdict.exit_code,
        "summary": verdict.summary,
        "first_departure": None if first is None else _comparison(first),
        "findings": [
            {**dataclasses.asdict(one), "cause": one.cause.value} for one in verdict.findings
        ],
        "tolerances": verdict.tolerances,
        "notes": list(verdict.notes),
        "settings": _without_nan(dict(verdict.settings)),
        "layers": [dataclasses.asdict(layer) for layer in verdict.layers],
        "comparisons": [_comparison(one) for one in verdict.comparisons],
    }


def _comparison(one: Comparison) -> dict[str, Any]:
    return {
        "kind": one.kind.value,
        "name": one.name,
        "layer": one.layer,
        "step": one.step,
        "difference": _number(one.difference),
        "tolerance": _number(one.tolerance),
        "agrees": one.agrees,
    }


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_dict(document: Any) -> Verdict:
    """The verdict that `as_dict` made it of.

    Raises:
        InputError: it is no such document, or of another schema.
    """
    found = document if isinstance(document, Mapping) else {}
    if found.get("format") != _FORMAT or found.get("schema") != SCHEMA:
        raise InputError(
            f"A report of syncbn verify requires format {_FORMAT!r} and schema {SCHEMA}. Received: "
            f"format {found.get('format')!r} and schema {found.get('schema')!r}. Give a file that "
            "`syncbn verify` of this version wrote."
        )
    try:
        return _from_fields(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"A report of syncbn verify requires all fields of schema {SCHEMA}. Received: one with "
            f"{type(error).__name__}: {error}. Write it anew."
        ) from error


def _from_fields(found: Mapping[str, Any]) -> Verdict:
    outcomes = {outcome.word: outcome for outcome in Outcome}
    return Verdict(
        outcome=outcomes[found["outcome"]],
        summary=str(found["summary"]),
        findings=tuple(
            Finding(Cause(one["cause"]), one["layer"], one["step"], one["evidence"], one["remedy"])
            for one in found["findings"]
        ),
        layers=tuple(
            Layer(**{field.name: one[field.name] for field in dataclasses.fields(Layer)})
            for one in found["layers"]
        ),
        comparisons=tuple(
            Comparison(
                Kind(one["kind"]),
                one["name"],
                one["layer"],
                one["step"],
                _float(one["difference"]),
                _float(one["tolerance"]),
            )
            for one in found["comparisons"]
        ),
        settings=dict(found["settings"]),
        tolerances=str(found["tolerances"]),
        notes=tuple(found["notes"]),
    )


def _float(value: Any) -> float:
    if value is None:
        return math.nan
    return _INFINITE[value] if isinstance(value, str) else float(value)


def write_json(verdict: Verdict, path: str | Path) -> None:
    """Write the document: a line for each field, layer and comparison.

    Raises:
        OSError: it cannot be written; what was there stays. `syncbn.files.check_writable` asks
            beforehand.
    """
    fields = []
    for name, value in as_dict(verdict).items():
        if isinstance(value, list) and value:
            items = ",\n".join(f"    {_dumped(item)}" for item in value)
            fields.append(f"  {_dumped(name)}: [\n{items}\n  ]")
        else:
            fields.append(f"  {_dumped(name)}: {_dumped(value)}")
    text = "{\n" + ",\n".join(fields) + "\n}\n"
    with written_whole(Path(path)) as temporary:
        # Half a surrogate pair, which a name may hold and UTF-8 cannot, becomes JSON's \udxxx.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read_json(path: str | Path) -> Verdict:
    """The verdict of a file that `write_json` wrote.

    Raises:
        InputError: there is no such file, or it is no such report.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"A report of syncbn verify requires a JSON file. Received: {str(path)!r} ({error}). "
            "Give a file that `syncbn verify` wrote."
        ) from error
    return from_dict(document)
