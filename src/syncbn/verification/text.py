"""The report as text: plain, and the same with rich where there is a terminal."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from syncbn.verification.rows import (
    Fold,
    Row,
    figure,
    folded,
    kinds_of,
    of_model,
    printable,
    rows_of,
    said_of,
)
from syncbn.verification.verdict import Comparison, Kind, Outcome, Verdict

__all__ = ["as_text", "headline", "show"]

WIDTH = 100
_GAP = 2
_LEAST_NAME = 16
# What a table needs for names, and for each kind.
_NAME, _COLUMN = 24, 12
_HEADINGS = {
    Kind.STATISTIC: "moving\nstatistics",
    Kind.SPREAD: "spread over\nreplicas",
    Kind.NORMALIZATION: "normali-\nzation",
}
_COLOURS = {
    Outcome.AGREES: "bold green",
    Outcome.DEPARTS: "bold red",
    Outcome.CANNOT_TELL: "bold yellow",
}


class _Line(NamedTuple):
    """A row of the table: cells of several lines each, and how it stands out."""

    cells: tuple[str, ...]
    style: str = ""


class _Paragraph(NamedTuple):
    text: str
    indent: int = 0
    style: str = ""


def as_text(verdict: Verdict, width: int = WIDTH, every: bool = False) -> str:
    """The report as plain text, which needs no other package.

    Args:
        verdict: what was found.
        width: of the lines.
        every: show all layers of deep models too.
    """
    lines: list[str] = []
    for part in _before_the_table(verdict):
        lines += _wrapped(part, width)
    kinds = _fitting(verdict, width)
    lines += _plain_table(_table(verdict, kinds, every), width)
    for part in _behind_the_table(verdict, kinds):
        lines += _wrapped(part, width)
    return "\n".join(lines)


def show(verdict: Verdict, file: TextIO | None = None, every: bool = False) -> None:
    """Print the report: with rich in a terminal, plain of 100 columns elsewhere.

    Args:
        verdict: what was found.
        file: to print to; by default stdout.
        every: show all layers of deep models too.
    """
    file = sys.stdout if file is None else file
    console = _console(file)
    if console is None:
        encoding = getattr(file, "encoding", None) or "utf-8"
        text = as_text(verdict, every=every)
        file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        return
    for part in _before_the_table(verdict):
        _print_rich(console, part)
    kinds = _fitting(verdict, console.width)
    lines = _table(verdict, kinds, every)
    if lines:
        console.print(_rich_table(lines))
    for part in _behind_the_table(verdict, kinds):
        _print_rich(console, part)


def headline(verdict: Verdict) -> str:
    """The outcome and the summary in one line."""
    return f"{verdict.outcome.word.upper()}: {printable(verdict.summary)}"


def _before_the_table(verdict: Verdict) -> Iterator[_Paragraph]:
    yield _Paragraph(headline(verdict), style=_COLOURS[verdict.outcome])
    for number, one in enumerate(of_model(verdict)):
        if not number:
            yield _Paragraph("")
        mark = "" if one.agrees else "  departs"
        yield _Paragraph(
            f"{model_name(one)}: {said_of(one)}{mark}", style="" if one.agrees else "red"
        )
    if kinds_of(verdict):
        yield _Paragraph("")


def _fitting(verdict: Verdict, width: int) -> list[Kind]:
    """The kinds whose columns fit; those that agree everywhere give way first."""
    kinds = list(kinds_of(verdict))
    worst = {kind: verdict.worst(kind) for kind in kinds}

    def stays(kind: Kind) -> tuple[bool, bool]:
        one = worst[kind]
        return kind is Kind.OUTPUT, one is not None and not one.agrees

    while len(kinds) > 1 and _NAME + _COLUMN * len(kinds) > width:
        kinds.remove(min(reversed(kinds), key=stays))
    return kinds


def _table(verdict: Verdict, kinds: Sequence[Kind], every: bool) -> list[_Line]:
    """The heading and a line for each layer, or for a run of them."""
    if not kinds:
        return []
    head = ("layer\nclass", *(_HEADINGS.get(kind, f"\n{kind.value}") for kind in kinds))
    lines = [_Line(head, "bold")]
    for row in folded(rows_of(verdict), every):
        if isinstance(row, Fold):
            lines.append(_Line((row.words, *_cells(row, kinds)), "dim"))
            continue
        name = f"{row.number} {printable(row.layer.path)}\n{printable(row.layer.class_name)}"
        if row.mark:
            name = f"{name.rstrip()}\n{'▶ ' * row.is_first}{row.mark.upper()}"
        style = "bold red" if row.is_first else "red" if row.departs else ""
        lines.append(_Line((name.rstrip(), *_cells(row, kinds)), style))
    return lines


def _cells(row: Row | Fold, kinds: Sequence[Kind]) -> Iterator[str]:
    worst = row.worst
    for kind in kinds:
        yield _cell(worst[kind]) if kind in worst else "–"


def _cell(one: Comparison) -> str:
    """Difference and step, then tolerance; `!` where it departs."""
    mark = "" if one.agrees else "! "
    relation = "≤" if one.agrees else "≰" if one.difference != one.difference else ">"
    step = "" if one.difference == 0 else f" @{one.step}"
    return f"{mark}{figure(one.difference)}{step}\n{relation} {figure(one.tolerance)}"


def _behind_the_table(verdict: Verdict, kinds: Sequence[Kind]) -> Iterator[_Paragraph]:
    for kind in kinds_of(verdict):
        one = verdict.worst(kind)
        if kind not in kinds and one is not None:
            yield _Paragraph(
                f"No room above for {kind.value}; at worst {said_of(one)}: {printable(one.name)}",
                style="" if one.agrees else "red",
            )
    if kinds:
        yield _Paragraph("")
        yield _Paragraph(
            "Of each layer the worst of all steps: difference @step, and ≤ the tolerance, or > it "
            "where it departs (!).",
            style="dim",
        )
    for number, finding in enumerate(verdict.findings, start=1):
        place = f"{printable(finding.layer)}, " if finding.layer else ""
        yield _Paragraph("")
        yield _Paragraph(f"{number}. {finding.cause.value} ({place}step {finding.step})", 0, "bold")
        yield _Paragraph(printable(finding.evidence), 3)
        if finding.remedy:
            yield _Paragraph(f"What to do: {printable(finding.remedy)}", 3)
    if verdict.tolerances:
        yield _Paragraph("")
        yield _Paragraph(f"Tolerances: {printable(verdict.tolerances)}")
    if verdict.settings:
        yield _Paragraph("")
        yield _Paragraph(f"Settings: {settings_in_words(verdict.settings)}")
    for number, note in enumerate(verdict.notes):
        if not number:
            yield _Paragraph("")
        yield _Paragraph(f"Note: {printable(note)}")


def model_name(one: Comparison) -> str:
    """What was compared of the model as a whole."""
    return f"metric {printable(one.name)}" if one.kind is Kind.METRIC else one.kind.value


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """All in one line."""
    return "; ".join(
        f"{printable(name)}: {setting_in_words(value)}" for name, value in settings.items()
    )


def setting_in_words(value: Any) -> str:
    """Text as it is, several values in a line, all else as JSON has it."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{printable(name)} {setting_in_words(item)}" for name, item in value.items()
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting_in_words, value))
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return printable(text)


def _wrapped(part: _Paragraph, width: int) -> list[str]:
    indent = " " * part.indent
    found = textwrap.wrap(
        part.text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return found or [""]


def _plain_table(lines: Sequence[_Line], width: int) -> Iterator[str]:
    if not lines:
        return
    split = [[cell.split("\n") for cell in line.cells] for line in lines]
    widths = [max(len(part) for row in split for part in row[at]) for at in range(len(split[0]))]
    room = width - sum(widths[1:]) - _GAP * (len(widths) - 1)
    widths[0] = min(widths[0], max(_LEAST_NAME, room))
    for number, row in enumerate(split):
        names = [part for name in row[0] for part in textwrap.wrap(name, widths[0]) or [""]]
        columns = [names, *row[1:]]
        for at in range(max(map(len, columns))):
            cells = [column[at] if at < len(column) else "" for column in columns]
            sides = [cell.rjust(size) for cell, size in zip(cells[1:], widths[1:], strict=True)]
            yield (" " * _GAP).join([cells[0].ljust(widths[0]), *sides]).rstrip()
        if not number:
            yield "-" * (sum(widths) + _GAP * (len(widths) - 1))


def _console(file: TextIO) -> Any | None:
    """A console of rich, where it is there and the file is a terminal."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else None


def _print_rich(console: Any, part: _Paragraph) -> None:
    from rich.padding import Padding
    from rich.text import Text

    # Never as markup: names of layers are anything.
    console.print(Padding(Text(part.text, part.style), (0, 0, 0, part.indent), expand=False))


def _rich_table(lines: Sequence[_Line]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, cell in enumerate(lines[0].cells):
        table.add_column(
            Text(cell),
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=bool(number),
            vertical="top",
        )
    for line in lines[1:]:
        first, *others = line.cells
        table.add_row(
            Text(first, line.style),
            *(
                Text(cell, line.style if line.style == "dim" else "red" * cell.startswith("!"))
                for cell in others
            ),
        )
    return table
