"""The report as people read it."""

from __future__ import annotations

import textwrap
from typing import Any

from syncbn.doctor.findings import Finding
from syncbn.doctor.table import Defect
from syncbn.doctor.verdict import NAMES, Report, TriedLayer

__all__ = ["text_of"]

_WIDTH = 100
_KNOWN = {
    "run": "",
    "read": "read, not run",
    "report": "reported, not run",
}
_BY = {
    "global": "yes",
    "local": "LOCAL",
    "global, mask ignored": "MASK IGNORED",
    "local, mask ignored": "LOCAL",
}
_PLACES = {
    "tensorflow": "under MirroredStrategy",
    "jax": "under shard_map and keras.distribution",
    "torch": "in one process group",
}


def text_of(report: Report) -> str:
    """All of it; the first line is the answer."""
    parts = [_wrapped(report.sentence, "")]
    if report.tried:
        parts.append(_trial(report))
    if report.about:
        parts.append(_table(report))
    if report.defects:
        parts.append(_defects(report))
    if report.row is not None:
        parts.append("What to write\n\n" + textwrap.indent(report.row.write, "    "))
    if report.machine is not None:
        parts.append(_machine(report))
    if report.findings:
        parts.append("To see to\n\n" + "\n".join(map(_finding, _sorted(report.findings))))
    return "\n\n".join(parts)


def _wrapped(text: str, indent: str, first: str | None = None) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _trial(report: Report) -> str:
    place = _PLACES.get(report.facts.get("backend", ""), "")
    heading = (
        f"Tried on {report.facts.get('replicas', 'two replicas')} {place}: does each replica "
        "normalize by the statistics of all?"
    )
    cases = list(dict.fromkeys(case for layer in report.tried for case in layer.cases))
    titles = ["mean 1e4" if case == "large mean" else case for case in cases]
    rows = [["", *titles, "moving mean"]]
    for layer in report.tried:
        cells = [_cell(layer.cases[case]) if case in layer.cases else "?" for case in cases]
        rows.append([layer.name, *cells, _moving(layer)])
    lines = [_wrapped(heading, ""), "", *_columns(rows)]
    remarks = [
        f"{name} could not be tried: {because}"
        for name, because in report.refused.items()
        if because != "gone"
    ]
    remarks += [
        f"{layer.name}, {case}: {found['failed']}"
        for layer in report.tried
        for case, found in layer.cases.items()
        if "failed" in found
    ]
    for remark in remarks:
        lines += ["", _wrapped(remark, "    ", "  ")]
    if report.trouble:
        lines += ["", _wrapped(f"Not all of it was tried: {report.trouble}.", "    ", "  ")]
    return "\n".join(lines)


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cell(case: dict[str, Any]) -> str:
    if "failed" in case:
        return "FAILED"
    if case["by"] == "neither":
        return "NaN" if case["error"] is None else f"OFF BY {case['error']:.2g}"
    return _BY[case["by"]]


def _moving(layer: TriedLayer) -> str:
    """Whether the replicas keep one, in the plainest case; and what would be saved."""
    case = layer.cases.get("equal parts", {})
    if "moving_spread" not in case:
        return "?"
    spread, off = case["moving_spread"], case["moving_read_error"]
    if spread == 0:
        return "one"
    saved = (
        "averaged when read"
        if off is not None and off <= case["tolerance"]
        else "saves replica 0's"
    )
    return f"differs, {saved}"


def _table(report: Report) -> str:
    if report.row is None:
        return _wrapped(
            f"{report.about} is not in the table of versions, which ends at {report.table_ends}.",
            "",
        )
    row = report.row
    lines = [_wrapped(f"{report.about}, by the table of versions: {row.says}.", ""), ""]
    for layer in row.native:
        lines.append(f"    {layer}{'  (deprecated)' * (layer in row.deprecated)}")
    lines.append(_wrapped(_evidence(row.known, row.sources) + "]", "   ", "  ["))
    return "\n".join(lines)


def _evidence(known: str, sources: tuple[str, ...]) -> str:
    return "; ".join(filter(None, [_KNOWN[known], *sources]))


def _defects(report: Report) -> str:
    return "\n\n".join(["Known defects", *map(_defect, report.defects)])


def _defect(defect: Defect) -> str:
    sources = tuple(source for source in defect.sources if source not in defect.reports)
    known = f"{defect.where()}; {_evidence(defect.known, sources)}"
    reports = ", ".join(defect.reports) or "no report found"
    return "\n".join(
        [
            _wrapped(defect.says, "    ", "  - "),
            _wrapped(f"Instead: {defect.instead}", "    "),
            _wrapped(f"{known}; {reports}]", "     ", "    ["),
        ]
    )


def _machine(report: Report) -> str:
    machine, facts = report.machine, report.facts
    assert machine is not None
    versions = {
        **machine.versions,
        **{name: version for name, version in facts.get("versions", {}).items() if name in NAMES},
    }
    lines = [
        _wrapped(
            "versions: "
            + ", ".join(f"{name} {version or '?'}" for name, version in versions.items()),
            "    ",
            "  ",
        ),
        f"  Keras runs on {machine.backend} ({machine.backend_by})"
        + ("; tf.keras is tf_keras (TF_USE_LEGACY_KERAS)" if machine.legacy else ""),
    ]
    if "devices" in facts:
        lines.append(_wrapped(f"devices: {', '.join(facts['devices'])}", "    ", "  "))
        gpus = "NCCL needs GPUs, of which it sees none" if not facts["gpus"] else "GPUs"
        count = f"{facts['gpus']} " * bool(facts["gpus"])
        lines.append(f"  collectives: {facts['collectives']} ({count}{gpus})")
    if "xla" in facts:
        lines.append(_wrapped(f"XLA: {facts['xla']}", "    ", "  "))
    lines += [f"  {who}: {answer}" for who, answer in report.peers.items()]
    return "\n".join(["This machine", "", *lines])


def _sorted(findings: tuple[Finding, ...]) -> list[Finding]:
    return sorted(findings, key=lambda one: ("error", "warning", "note").index(one.level))


def _finding(finding: Finding) -> str:
    text = f"{finding.level}: {finding.about}: {finding.says} {finding.do}".strip()
    return _wrapped(text, "    ", "  ")
