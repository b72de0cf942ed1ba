"""The answer, from what was tried on this machine, or from the table of versions alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from syncbn.doctor.children import Outcome
from syncbn.doctor.findings import Finding
from syncbn.doctor.machine import Machine
from syncbn.doctor.table import Defect, Row, Subject, Table

__all__ = ["NAMES", "Report", "TriedLayer", "by_table", "by_trial", "tried_layers"]

FORMAT = 1
NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}
_CASES = {
    "equal parts": "equal parts",
    "unequal parts": "parts of unequal sizes",
    "masked": "a mask",
    "large mean": "a mean of 1e4",
}


@dataclass(frozen=True)
class TriedLayer:
    """A layer that was tried, and by which statistics it normalized in each case.

    Attributes:
        name: as it is written.
        role: "plain", "native" or "ours"; the latter two are to synchronize.
        cases: what was measured by case: `by`, `error`, `tolerance`, …, or `failed`.
    """

    name: str
    role: str
    cases: dict[str, dict[str, Any]]

    def failing(self) -> list[str]:
        """The cases in which it does not normalize by the global statistics."""
        return [name for name, case in self.cases.items() if case.get("by") != "global"]

    def synchronizes(self) -> bool:
        """Whether it does at all: in the plainest case."""
        return self.cases.get("equal parts", {}).get("by") == "global"


@dataclass(frozen=True)
class Report:
    """All that the doctor has to say.

    Attributes:
        available: True, False, or None where it cannot be told.
        sentence: the answer in one sentence.
        about: the versions it is about; empty where there is nothing.
        row: what the table says of them, or None beyond its end.
        table_ends: where that is.
        defects: known of them.
        tried: the layers that were tried here.
        refused: why a layer could not be made, by its name.
        trouble: why the trial came to no end, or empty.
        facts: devices, collectives, XLA and the like, as the trial found them.
        machine: what is installed and set; None for an answer from the table.
        peers: what came of calling each of the other workers.
        findings: what is to be seen to.
    """

    available: bool | None
    sentence: str
    about: str
    row: Row | None
    table_ends: str
    defects: tuple[Defect, ...]
    tried: tuple[TriedLayer, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    trouble: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    machine: Machine | None = None
    peers: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 available and working, 1 not, 2 cannot tell."""
        return {True: 0, False: 1, None: 2}[self.available]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        machine = None
        if self.machine is not None:
            machine = asdict(self.machine)
            del machine["findings"]  # they are among all findings
        return {
            "format": FORMAT,
            "available": self.available,
            "exit_code": self.exit_code,
            "sentence": self.sentence,
            "about": self.about,
            "table": None if self.row is None else asdict(self.row),
            "table_ends": self.table_ends,
            "defects": [asdict(defect) for defect in self.defects],
            "tried": [asdict(layer) for layer in self.tried],
            "refused": self.refused,
            "trouble": self.trouble,
            "facts": self.facts,
            "machine": machine,
            "peers": self.peers,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def by_table(subject: Subject, table: Table) -> Report:
    """The answer for versions that need not be here."""
    rows = table.rows_of(subject)
    row = rows[0] if rows else None
    if row is None:
        available = None
        sentence = (
            f"Cannot tell: {subject} is newer than the table, which ends at {table.end()}. Where "
            "it is installed, `syncbn doctor` tries it."
        )
    elif row.native:
        available = True
        layers = " and ".join(
            f"{layer}{' (deprecated)' * (layer in row.deprecated)}" for layer in row.native
        )
        sentence = f"Yes: {subject} has {layers}."
    else:
        available = False
        sentence = f"No: {subject} has {row.says}."
    defects = tuple(table.defects_of(subject)) if row is not None else ()
    return Report(available, sentence, str(subject), row, table.end(), defects)


def by_trial(
    subject: Subject,
    table: Table,
    machine: Machine,
    backend: str,
    outcome: Outcome | None,
    peers: Mapping[str, str],
    findings: list[Finding],
) -> Report:
    """The answer for this machine; `outcome` is None where there was nothing to try."""
    rows = table.rows_of(subject)
    tried: tuple[TriedLayer, ...] = ()
    refused: dict[str, str] = {}
    facts: dict[str, Any] = {}
    trouble = f"{NAMES.get(backend, repr(backend))} is not installed"
    if backend not in NAMES:
        trouble = f"Keras is to run on {backend!r} ({machine.backend_by}), on which nothing trains"
    if outcome is not None:
        tried = tried_layers(outcome)
        refused = {one["layer"]: one["because"] for one in outcome.every("refused")}
        facts = _facts(outcome)
        trouble = outcome.trouble()
    available, sentence = _answer(tried, refused, trouble, findings)
    return Report(
        available,
        sentence,
        "" if outcome is None else str(subject),
        rows[0] if rows and outcome is not None else None,
        table.end(),
        tuple(table.defects_of(subject)) if rows and outcome is not None else (),
        tried,
        refused,
        trouble,
        facts,
        machine,
        dict(peers),
        tuple(findings),
    )


def tried_layers(outcome: Outcome) -> tuple[TriedLayer, ...]:
    """What a probe has measured, by layer."""
    measured: dict[str, dict[str, Any]] = {}
    for one in outcome.every("measured"):
        rest = {key: value for key, value in one.items() if key not in ("layer", "case")}
        measured.setdefault(one["layer"], {})[one["case"]] = rest
    return tuple(
        TriedLayer(layer["name"], layer["role"], measured.get(layer["name"], {}))
        for layer in outcome.every("layer")
    )


def _facts(outcome: Outcome) -> dict[str, Any]:
    names = ("keras", "backend", "devices", "gpus", "replicas", "collectives", "xla")
    facts = {name: outcome.first(name) for name in names if outcome.first(name) is not None}
    facts["versions"] = dict(outcome.every("version"))
    facts["seconds"] = round(outcome.seconds, 1)
    return facts


def _answer(
    tried: tuple[TriedLayer, ...],
    refused: Mapping[str, str],
    trouble: str,
    findings: list[Finding],
) -> tuple[bool | None, str]:
    if trouble:
        return None, f"Cannot tell: {trouble}."
    ours = [layer for layer in tried if layer.role == "ours"]
    natives = [layer for layer in tried if layer.role == "native"]
    broken = [layer for layer in ours if layer.failing() or not layer.synchronizes()]
    if broken:
        return False, (
            f"No: {broken[0].name} {_fault(broken[0])}. That should not be: please report it with "
            "the output of `syncbn doctor --json`."
        )
    working = [layer for layer in natives if layer.synchronizes()]
    if not ours and not working:
        reason = refused.get("syncbn", "")
        return False, (
            "No: no layer that is here synchronizes"
            + (f", and syncbn's own cannot be used ({reason})." if reason else ".")
        )
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        return False, (
            f"Not as it is set up: {errors[0].about}: {errors[0].says} (The layers themselves "
            "work, see below.)"
        )
    parts = []
    if ours:
        parts.append(f"{_own_name(ours)} synchronizes here in every case that was tried")
    for layer in natives:
        if layer in working and not layer.failing():
            parts.append(f"{layer.name} does too" if parts else f"{layer.name} synchronizes here")
        elif layer in working:
            parts.append(
                f"{layer.name} does not with {_listed(layer)}"
                if parts
                else f"{layer.name} synchronizes here, but not with {_listed(layer)}"
            )
        else:
            parts.append(f"{layer.name} does not")
    return True, f"Yes: {'; '.join(parts)}."


def _fault(layer: TriedLayer) -> str:
    """What a layer does that was to synchronize and does not."""
    failed = [case["failed"] for case in layer.cases.values() if "failed" in case]
    if failed:
        return f"ends here with an error ({failed[0]})"
    return f"does not synchronize here with {_listed(layer)}"


def _own_name(ours: list[TriedLayer]) -> str:
    # Of several contexts it was tried in, all of them work.
    return ours[0].name.partition(", ")[0]


def _listed(layer: TriedLayer) -> str:
    """Where it fails, as "a mask, and a mean of 1e4"."""
    names = [_CASES[name] for name in layer.failing()]
    return ", nor with ".join(names) if names else "anything"
