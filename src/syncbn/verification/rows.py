"""What all reports show of a verdict: by layer the worst of each kind, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from syncbn.verification.verdict import Comparison, Kind, Layer, Verdict

__all__ = [
    "LAYER_KINDS",
    "Fold",
    "Row",
    "figure",
    "folded",
    "kinds_of",
    "of_model",
    "printable",
    "rows_of",
    "said_of",
]

# What is compared of a layer, in the order in which a step computes it.
LAYER_KINDS = (
    Kind.OUTPUT,
    Kind.NORMALIZATION,
    Kind.GRADIENT,
    Kind.WEIGHT,
    Kind.STATISTIC,
    Kind.SPREAD,
)
MODEL = "(the model itself)"
# A model of so many layers is shown whole.
_SHORT = 24
# Of a longer one so many departing layers from the first on, besides those with findings and the
# worst: behind the first most do.
_DEPARTING = 8


class Row(NamedTuple):
    """A layer and what was compared of it.

    Attributes:
        number: its place, from 1, in the order in which the step called the layers.
        layer: itself; one of the name `(the model itself)` holds what belongs to no layer.
        worst: of each kind the comparison that is furthest off.
        is_first: whether the model departs first here.
        has_finding: whether a cause was found here.
    """

    number: int
    layer: Layer
    worst: Mapping[Kind, Comparison]
    is_first: bool
    has_finding: bool

    @property
    def departs(self) -> bool:
        """Whether rounding does not explain all of it."""
        return not all(one.agrees for one in self.worst.values())

    @property
    def mark(self) -> str:
        """The answer in a word."""
        return "departs first" if self.is_first else "departs" if self.departs else ""


class Fold(NamedTuple):
    """A run of layers that is shown as one."""

    rows: Sequence[Row]

    @property
    def words(self) -> str:
        """Which and how many."""
        departing = sum(row.departs for row in self.rows)
        said = "agree" if not departing else "depart"
        if 0 < departing < len(self.rows):
            said = f"more, of which {departing} depart"
        elif departing:
            said = "more depart"
        first, last = self.rows[0].number, self.rows[-1].number
        return f"… {len(self.rows)} layers {said} ({first} to {last})"

    @property
    def worst(self) -> Mapping[Kind, Comparison]:
        """Of all of them."""
        worst: dict[Kind, Comparison] = {}
        for row in self.rows:
            for one in row.worst.values():
                _keep_worse(worst, one)
        return worst


def _keep_worse(worst: dict[Kind, Comparison], one: Comparison) -> None:
    known = worst.get(one.kind)
    if known is None or one.excess > known.excess:
        worst[one.kind] = one


def rows_of(verdict: Verdict) -> list[Row]:
    """A row for each layer, and for what belongs to none of them."""
    layers = {layer.path: layer for layer in verdict.layers}
    worst: dict[str, dict[Kind, Comparison]] = {path: {} for path in layers}
    for one in verdict.comparisons:
        if one.kind in LAYER_KINDS:
            _keep_worse(worst.setdefault(one.layer, {}), one)
    first = verdict.first_departure
    found = {finding.layer for finding in verdict.findings}
    return [
        Row(
            number,
            layers.get(path) or Layer(path or MODEL, "", 0, ""),
            of_layer,
            first is not None and first.kind in LAYER_KINDS and first.layer == path,
            path in found,
        )
        for number, (path, of_layer) in enumerate(worst.items(), start=1)
    ]


def kinds_of(verdict: Verdict) -> tuple[Kind, ...]:
    """The kinds that were compared of layers."""
    there = {one.kind for one in verdict.comparisons}
    return tuple(kind for kind in LAYER_KINDS if kind in there)


def of_model(verdict: Verdict) -> list[Comparison]:
    """Of the data, the loss and each metric the comparison that is furthest off."""
    worst: dict[tuple[Kind, str], Comparison] = {}
    for one in verdict.comparisons:
        key = one.kind, one.name
        if one.kind not in LAYER_KINDS and (key not in worst or one.excess > worst[key].excess):
            worst[key] = one
    order = list(Kind)
    return sorted(worst.values(), key=lambda one: (order.index(one.kind), one.name))


def folded(rows: Sequence[Row], every: bool = False) -> list[Row | Fold]:
    """The rows of a model of any depth, few enough to read.

    Kept are the first that departs and its neighbours, the next few that depart, those where a
    cause was found, and of each kind the furthest off; the others are folded.

    Args:
        rows: of all layers.
        every: fold none.
    """
    if every or len(rows) <= _SHORT:
        return list(rows)
    kept = {number for number, row in enumerate(rows) if row.is_first or row.has_finding}
    kept |= {number + step for number in kept if rows[number].is_first for step in (-1, 1)}
    from_first = next((number for number, row in enumerate(rows) if row.is_first), 0)
    departing = [number for number, row in enumerate(rows) if row.departs and number >= from_first]
    kept |= set(departing[:_DEPARTING])
    for kind in LAYER_KINDS:
        there = [number for number, row in enumerate(rows) if kind in row.worst]
        kept |= set(sorted(there, key=lambda at: rows[at].worst[kind].excess)[-1:])
    shown: list[Row | Fold] = []
    run: list[Row] = []
    for number, row in enumerate(rows):
        if number not in kept:
            run.append(row)
        if run and (number in kept or number == len(rows) - 1):
            shown += run if len(run) == 1 else [Fold(tuple(run))]
            run = []
        if number in kept:
            shown.append(row)
    return shown


def figure(value: float) -> str:
    """A difference, short: two digits, and 0 only where it is exactly that."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite"
    return "0" if value == 0 else f"{value:.2g}"


def said_of(one: Comparison) -> str:
    """A difference with its tolerance and step, in words."""
    if one.difference == 0:
        return "exactly the same in all steps"
    relation = "within" if one.agrees else "beyond"
    return (
        f"{figure(one.difference)}, {relation} the tolerance {figure(one.tolerance)}, step "
        f"{one.step}"
    )


def printable(text: str) -> str:
    r"""The same with `\x1b` and the like for what would steer a terminal or is no text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
