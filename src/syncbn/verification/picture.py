"""The picture of divergence by layer and step: matplotlib's drawing as SVG for a page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

from syncbn.verification.rows import LAYER_KINDS, Row, figure, kinds_of, printable, rows_of
from syncbn.verification.verdict import Comparison, Kind, Verdict

__all__ = ["CROSS", "LEGEND", "Shade", "drawn", "shade_of"]


class Shade(NamedTuple):
    """A class of differences.

    Attributes:
        most: times the tolerance, up to which it goes.
        colour: blue where rounding explains it, orange to red where not: all common kinds of colour
            vision tell these apart, and in grey both grow darker away from the tolerance.
        words: for the legend.
    """

    most: float
    colour: str
    words: str


LEGEND = (
    Shade(0.0, "#d4d4d4", "0 exactly"),
    Shade(1e-3, "#1f66ad", "under 1/1000 of the tolerance"),
    Shade(1e-2, "#5a9bd0", "under 1/100"),
    Shade(1e-1, "#93c3e3", "under 1/10"),
    Shade(1.0, "#c9e0f1", "up to the tolerance"),
    Shade(1e1, "#fdb35c", "up to 10 times"),
    Shade(1e2, "#f58634", "up to 100 times"),
    Shade(1e4, "#dd3f1d", "up to 10 000 times"),
    Shade(math.inf, "#ab0f1a", "more"),
    Shade(math.nan, "#c77cd6", "NaN or infinite"),
)
_NAN = LEGEND[-1]
# On the shade of NaN, in light and dark.
CROSS = "#141414"
# Whatever is black takes the colour of the page's text; no shade is.
_BLACK = "#000000"
_LEFT, _RIGHT, _TOP, _GAP = 122.0, 150.0, 30.0, 14.0
_BREADTH, _MOST_BREADTH, _LEAST_BREADTH = 830.0, 56.0, 2.5
_NAMES_FROM = 11.0  # of a cell's breadth; narrower ones have no room for a name
_MOST_STEPS = 16
_HEIGHT = 120.0
_LONGEST = 30
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def shade_of(one: Comparison) -> Shade:
    """By how many times the tolerance it is off."""
    if not math.isfinite(one.difference):
        return _NAN
    return next(shade for shade in LEGEND if one.excess <= shade.most)


class _Grid(NamedTuple):
    """Where everything is, in points from the upper left corner."""

    rows: Sequence[Row]
    kinds: Sequence[Kind]
    ranges: Sequence[range]  # the steps of each line of cells
    breadth: float  # of a cell
    height: float
    names: float  # room for the names of the layers

    @property
    def panel(self) -> float:
        return self.height * len(self.ranges)

    @property
    def right(self) -> float:
        return _LEFT + self.breadth * len(self.rows)

    @property
    def bottom(self) -> float:
        return _TOP + len(self.kinds) * (self.panel + _GAP) - _GAP

    @property
    def size(self) -> tuple[float, float]:
        return max(self.right + _RIGHT, 420.0), self.bottom + self.names

    def top(self, panel: int) -> float:
        return _TOP + panel * (self.panel + _GAP)

    def x(self, number: float) -> float:
        """The left edge of that layer's cells, from 0."""
        return _LEFT + self.breadth * number


def drawn(verdict: Verdict) -> str:
    """An `svg` element: a panel for each kind, a column for each layer, a line for each step.

    Every cell has a `title` with its values. It holds no style, script or reference to anything, so
    that the strictest of policies lets it be drawn. "" where nothing was compared of layers.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    grid = _grid(verdict)
    if not grid.kinds:
        return ""
    width, height = grid.size
    titles: dict[str, str] = {}
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "syncbn", "font.size": 9}),
        warnings.catch_warnings(),
    ):
        # The browser has fonts for letters that matplotlib's has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = canvas.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        for number, kind in enumerate(grid.kinds):
            titles |= _draw_panel(axes, grid, number, _worst(verdict, kind, grid.ranges))
        _draw_names(axes, grid)
        _draw_first(axes, grid, verdict)
        file = io.BytesIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _for_a_page(file.getvalue(), titles, _in_words(grid))


def _grid(verdict: Verdict) -> _Grid:
    rows = rows_of(verdict)
    steps = sorted({one.step for one in verdict.comparisons if one.kind in LAYER_KINDS})
    each = math.ceil(len(steps) / _MOST_STEPS) or 1
    ranges = [
        range(steps[at], steps[min(at + each, len(steps)) - 1] + 1)
        for at in range(0, len(steps), each)
    ]
    breadth = min(_MOST_BREADTH, max(_LEAST_BREADTH, _BREADTH / max(1, len(rows))))
    longest = max((min(len(_short(row.layer.path)), _LONGEST) for row in rows), default=0)
    names = longest * 5.3 + 16 if breadth >= _NAMES_FROM else 34.0
    height = min(16.0, _HEIGHT / max(1, len(ranges)))
    # One line of cells still has room for the words beside it.
    height = max(height, 26.0 / max(1, len(ranges)))
    return _Grid(rows, kinds_of(verdict), ranges, breadth, height, names)


def _short(path: str) -> str:
    """A name that fits: its end tells layers apart."""
    name = printable(path)
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def _worst(
    verdict: Verdict, kind: Kind, ranges: Sequence[range]
) -> Mapping[tuple[str, int], Comparison]:
    """By layer and line of the panel."""
    lines = {step: line for line, steps in enumerate(ranges) for step in steps}
    worst: dict[tuple[str, int], Comparison] = {}
    for one in verdict.comparisons:
        if one.kind is not kind:
            continue
        key = one.layer, lines[one.step]
        if key not in worst or one.excess > worst[key].excess:
            worst[key] = one
    return worst


def _draw_panel(
    axes: Any, grid: _Grid, number: int, worst: Mapping[tuple[str, int], Comparison]
) -> dict[str, str]:
    """Draw it; what to say of each cell."""
    from matplotlib.patches import Rectangle

    top, kind = grid.top(number), grid.kinds[number]
    titles = {}
    gap = min(1.0, grid.breadth / 8)
    paths = {row.layer.path: place for place, row in enumerate(grid.rows)}
    for (path, line), one in worst.items():
        place = paths.get(path, len(grid.rows) - 1)
        gid = f"cell-{number}-{place}-{line}"
        x, y = grid.x(place), top + line * grid.height
        shade = shade_of(one)
        axes.add_artist(
            Rectangle(
                (x, y),
                grid.breadth - gap,
                grid.height - min(1.0, grid.height / 8),
                facecolor=shade.colour,
                edgecolor="none",
                clip_on=False,
                gid=gid,
                snap=False,
            )
        )
        if shade is _NAN and grid.breadth >= 5 and grid.height >= 5:
            middle = x + (grid.breadth - gap) / 2, y + grid.height / 2
            _text(axes, *middle, "×", ha="center", color=CROSS)
        titles[gid] = _title(grid.rows[place], kind, one)
    _draw_frame(axes, grid, number, worst)
    return titles


def _draw_frame(
    axes: Any, grid: _Grid, number: int, worst: Mapping[tuple[str, int], Comparison]
) -> None:
    """The words beside a panel: what it is, the steps, the answer."""
    top, kind = grid.top(number), grid.kinds[number]
    middle = top + grid.panel / 2
    words = kind.value.replace("moving ", "moving\n").replace("spread over ", "spread over\n")
    _text(axes, _LEFT - 34, middle, words, ha="right", weight="bold")
    for line, steps in enumerate(grid.ranges):
        if grid.height >= 9 or line in {0, len(grid.ranges) - 1}:
            last = f"–{steps[-1]}" if len(steps) > 1 else ""
            said = f"{steps[0]}{last}"
            if line == 0 and not last:
                said = f"step {said}"
            _text(axes, _LEFT - 5, top + (line + 0.5) * grid.height, said, ha="right", size=7)
    departing = {path for (path, _), one in worst.items() if not one.agrees}
    layers = len({path for path, _ in worst})
    answer = f"✗ {len(departing)} of {layers} depart" if departing else "✓ agree"
    _text(axes, grid.right + 8, middle, answer, weight="bold" if departing else "normal")
    bottom = top + grid.panel
    axes.plot(
        [_LEFT - 2, _LEFT - 2, grid.right],
        [top, bottom + 1, bottom + 1],
        color=_BLACK,
        linewidth=0.6,
        clip_on=False,
        gid=f"frame-{number}",
    )


def _title(row: Row, kind: Kind, one: Comparison) -> str:
    times = f", {figure(one.excess)} times that" if math.isfinite(one.excess) else ""
    answer = "agrees" if one.agrees else "departs"
    name = "" if one.name == one.layer else f" ({printable(one.name)})"
    return (
        f"{row.number} {printable(row.layer.path)}, step {one.step}, {kind.value}{name}: {answer}; "
        f"{figure(one.difference)}, tolerance {figure(one.tolerance)}{times}"
    )


def _draw_names(axes: Any, grid: _Grid) -> None:
    y = grid.bottom + 6
    if grid.breadth >= _NAMES_FROM:
        for place, row in enumerate(grid.rows):
            x = grid.x(place + 0.5)
            weight = "bold" if row.is_first else "normal"
            name = _short(row.layer.path)
            _text(axes, x, y, name, ha="center", va="top", size=8, rotation=90, weight=weight)
        return
    every = next(step for step in (10, 20, 25, 50, 100, 200, 500) if step * grid.breadth >= 40)
    for number in (1, *range(every, len(grid.rows) + 1, every)):
        _text(axes, grid.x(number - 0.5), y, str(number), ha="center", va="top", size=8)
    words = "layers by number, in the order in which a step calls them"
    _text(axes, _LEFT, y + 13, words, va="top", size=8)


def _draw_first(axes: Any, grid: _Grid, verdict: Verdict) -> None:
    """A line down the column of the layer that departs first, and its name above."""
    first = verdict.first_departure
    place = next((place for place, row in enumerate(grid.rows) if row.is_first), None)
    if first is None or place is None:
        return
    x = grid.x(place + 0.5 - min(0.5, 0.5 / grid.breadth))
    row = grid.rows[place]
    is_left = x < (_LEFT + grid.right) / 2
    words = f"{row.number} {_short(row.layer.path)} departs first, in step {first.step}"
    _text(
        axes,
        x - 4 if is_left else x + 4,
        10,
        f"▼ {words}" if is_left else f"{words} ▼",
        ha="left" if is_left else "right",
        weight="bold",
        gid="first",
    )
    edges = (grid.x(place) - 0.8, grid.x(place + 1) - 0.2)
    axes.plot(
        [edges[0], edges[0], edges[1], edges[1], edges[0]],
        [_TOP - 4, grid.bottom + 3, grid.bottom + 3, _TOP - 4, _TOP - 4],
        color=_BLACK,
        linewidth=1.4,
        clip_on=False,
        gid="first-layer",
    )


def _text(axes: Any, x: float, y: float, words: str, **how: Any) -> None:
    style = {"va": "center", "color": _BLACK, "clip_on": False, **how}
    # Dollars of a name are no formula.
    axes.text(x, y, words, parse_math=False, **style)


def _in_words(grid: _Grid) -> str:
    kinds = ", ".join(kind.value for kind in grid.kinds)
    departing = sum(row.departs for row in grid.rows)
    first = next((row for row in grid.rows if row.is_first), None)
    where = f" The first is number {first.number}, {printable(first.layer.path)}." if first else ""
    return (
        f"Difference relative to the tolerance, by layer and step, of {kinds}: {departing} of "
        f"{len(grid.rows)} layers depart.{where} The table below has the figures."
    )


def _for_a_page(drawing: bytes, titles: Mapping[str, str], words: str) -> str:
    """The drawing with titles, and without what a strict policy refuses: style attributes."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(drawing)
    for name in ("metadata", "defs"):
        for element in root.findall(f"{{{_SVG}}}{name}"):
            root.remove(element)
    cells = []
    for parent in root.iter():
        # Each figure's own numbers; an id may not come twice in a page.
        gid = parent.attrib.pop("id", "")
        if gid in titles:
            cells.append((parent, gid))
        _restyle(parent)
    for group, gid in cells:
        group.set("class", "cell")
        group.set("data-layer", gid.split("-")[2])
        title = ElementTree.SubElement(group, f"{{{_SVG}}}title")
        title.text = titles[gid]
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.set("role", "img")
    root.set("aria-label", words)
    root.set("class", "wide" if width > 700 else "narrow")
    root.set("fill", "currentColor")
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub(r"\s*\n\s*", " ", text)


def _restyle(element: ElementTree.Element) -> None:
    """A style attribute as attributes, fonts but for their size left to the page."""
    for name, value in _declared(element.attrib.pop("style", "")):
        if name != "font-family":
            element.set(name, value.replace(_BLACK, "currentColor"))
    for name in ("d", "transform"):
        if name in element.attrib:
            short = re.sub(r"(\.\d)\d+", r"\1", element.attrib[name])
            element.set(name, " ".join(short.split()))


def _declared(style: str) -> Iterator[tuple[str, str]]:
    for declaration in filter(None, style.split(";")):
        name, _, value = declaration.partition(":")
        yield name.strip(), value.strip()
