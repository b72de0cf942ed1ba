"""The report as one page of HTML, which asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from syncbn.errors import InputError
from syncbn.files import check_writable, written_whole
from syncbn.verification.picture import CROSS, LEGEND, Shade, drawn
from syncbn.verification.rows import (
    Row,
    figure,
    kinds_of,
    of_model,
    printable,
    rows_of,
    said_of,
)
from syncbn.verification.text import model_name, setting_in_words
from syncbn.verification.verdict import Comparison, Kind, Outcome, Verdict

__all__ = ["as_html", "check_page", "write_page"]

# What departs is told comparison by comparison up to so many; all are in the JSON document.
_MOST_COMPARISONS = 500
_MARKS = {Outcome.AGREES: "✓", Outcome.DEPARTS: "✗", Outcome.CANNOT_TELL: "?"}


def check_page(path: str | Path) -> None:
    """Make sure that `write_page` can write there, before long work is done for it.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "A report as HTML requires matplotlib. Received: no such package. Install it: pip "
            "install 'syncbn[train]', or write the report as .json."
        ) from error
    del matplotlib
    check_writable(Path(path))


def write_page(verdict: Verdict, path: str | Path) -> None:
    """Write the page; what was there stays unless all of it is written.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(Path(path)) as temporary:
        temporary.write_text(as_html(verdict), encoding="utf-8")


def as_html(verdict: Verdict) -> str:
    """One self-contained page, which a policy of its own keeps from asking for anything.

    `default-src 'none'` forbids every request; its style and its script are allowed by their
    hashes, so that no other runs, wherever a name of a layer may have brought it.
    """
    style, script = _resource("page.css"), _resource("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash_of(style)}; script-src {_hash_of(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"syncbn verify: {verdict.outcome.word}"
    parts = [
        "<!DOCTYPE html>\n",
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n",
        *_body(verdict),
        f"</main>\n<script>{script}</script>\n</body>\n</html>\n",
    ]
    return "".join(parts)


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


class _Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def _element(tag: str, *content: str, **attributes: str | None) -> _Markup:
    """An element; content and attributes are escaped unless they are HTML already."""
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(printable(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    end = "\n" if tag in {"tr", "section", "header"} else ""
    return _Markup(f"<{tag}{named}>{''.join(map(_escaped, content))}</{tag}>{end}")


def _escaped(text: str) -> str:
    return text if isinstance(text, _Markup) else html.escape(printable(text))


def _body(verdict: Verdict) -> Iterator[str]:
    word = verdict.outcome.word
    yield _element(
        "header",
        _element("h1", f"{_MARKS[verdict.outcome]} {word[0].upper()}{word[1:]}"),
        _element("p", verdict.summary),
        class_=f"outcome {word.replace(' ', '-')}",
    )
    rows = rows_of(verdict)
    yield from _findings(verdict, rows)
    yield from _figure(verdict)
    yield from _model(verdict)
    yield from _layers(verdict, rows)
    yield from _departing(verdict)
    if verdict.tolerances:
        yield _section("How far rounding may go", _element("p", verdict.tolerances))
    if verdict.notes:
        yield _section("Notes", *(_element("p", note) for note in verdict.notes))
    if verdict.settings:
        yield _section("Settings", _settings(verdict.settings))


def _section(heading: str, *content: str, **attributes: str | None) -> str:
    return _element("section", _element("h2", heading), *content, **attributes)


def _findings(verdict: Verdict, rows: Sequence[Row]) -> Iterator[str]:
    if not verdict.findings:
        return
    numbers = {row.layer.path: row.number for row in rows}
    items = []
    for finding in verdict.findings:
        place = f"step {finding.step}"
        if finding.layer:
            number = numbers.get(finding.layer)
            known = "" if number is None else f"layer {number}, "
            name = _element("code", finding.layer)
            place = _Markup(f"{_escaped(known)}{name}, {_escaped(place)}")
        items.append(
            _element(
                "li",
                _element(
                    "h3",
                    finding.cause.value,
                    " ",
                    _element("span", place, class_="place"),
                ),
                _element("p", finding.evidence),
                *(
                    [_element("p", _element("strong", "What to do: "), finding.remedy)]
                    if finding.remedy
                    else []
                ),
            )
        )
    yield _section("What departs, and why", _element("ol", *items, class_="findings"))


def _figure(verdict: Verdict) -> Iterator[str]:
    picture = drawn(verdict)
    if not picture:
        return
    legend = _element(
        "ul", *(_element("li", _swatch(shade), shade.words) for shade in LEGEND), class_="legend"
    )
    yield _section(
        "Differences by layer and step",
        _element(
            "p",
            "Each column is a layer, in the order in which a step calls them; each line of a panel "
            "is a step. The colour says how many times the tolerance the difference is: blue is "
            "what rounding explains, orange and red are not.",
            class_="soft",
        ),
        _element(
            "figure",
            _element("figcaption", legend),
            # It can be scrolled by keys where it is wider than the screen.
            _element(
                "div",
                _Markup(picture),
                class_="scroll",
                tabindex="0",
                role="group",
                aria_label="Picture of the differences",
            ),
            _element("output", "Point at a cell for its values; click for its row.", id="readout"),
        ),
    )


def _swatch(shade: Shade) -> _Markup:
    cross = f'<text x="8" y="12.5" text-anchor="middle" font-size="13" fill="{CROSS}">×</text>'
    return _Markup(
        f'<svg viewBox="0 0 16 16" aria-hidden="true"><rect width="16" height="16" '
        f'fill="{shade.colour}"/>{cross if math.isnan(shade.most) else ""}</svg>'
    )


def _model(verdict: Verdict) -> Iterator[str]:
    rows = [
        _element(
            "tr",
            _element("th", model_name(one), scope="row"),
            _element(
                "td",
                said_of(one),
                *([] if one.agrees else [" ", _mark("departs")]),
                class_=None if one.agrees else "off",
            ),
        )
        for one in of_model(verdict)
    ]
    if rows:
        head = _element("tr", _head("what"), _head("worst of all steps"))
        yield _section("The model as a whole", _table(head, rows, id="model"))


def _mark(words: str) -> _Markup:
    return _element("span", words, class_="mark")


def _head(
    words: str, is_figure: bool = False, sorts: bool = False, order: str | None = None
) -> _Markup:
    content = _element("button", words, type="button") if sorts else words
    # Of differences the largest are asked for first.
    first = "descending" if sorts and is_figure and not order else None
    return _element(
        "th",
        content,
        scope="col",
        class_="figure" if is_figure else None,
        data_first=first,
        aria_sort=order,
    )


def _table(head: str, rows: Iterable[str], **attributes: str | None) -> _Markup:
    table = _element("table", _element("thead", head), _element("tbody", *rows), **attributes)
    return _element("div", table, class_="scroll", tabindex="0", role="group", aria_label="Table")


def _layers(verdict: Verdict, rows: Sequence[Row]) -> Iterator[str]:
    kinds = kinds_of(verdict)
    if not kinds:
        return
    departing = sum(row.departs for row in rows)
    head = _element(
        "tr",
        _head("no.", is_figure=True, sorts=True, order="ascending"),
        _head("layer", sorts=True),
        *(_head(kind.value, is_figure=True, sorts=True) for kind in kinds),
    )
    content: list[str] = [
        _element(
            "p",
            "Of each layer and kind the worst of all steps and variables: the difference relative "
            "to the largest value on one device, below it the tolerance and the step.",
            class_="soft",
        )
    ]
    if 0 < departing < len(rows):
        box = _Markup('<input type="checkbox" id="departing">')
        label = f" only the {departing} of {len(rows)} that depart"
        content.append(_element("p", _element("label", box, label), class_="screen"))
    yield _section(
        f"Layers ({len(rows)})",
        *content,
        _table(head, (_layer(row, kinds) for row in rows), id="layers"),
    )


def _layer(row: Row, kinds: Sequence[Kind]) -> str:
    layer = row.layer
    kind_of = ", ".join(filter(None, (layer.class_name, layer.dtype)))
    name: list[str] = [layer.path]
    if row.mark:
        name += [" ", _mark(row.mark)]
    return _element(
        "tr",
        _element("td", str(row.number), class_="figure", data_value=str(row.number)),
        _element("th", *name, _element("span", kind_of, class_="soft"), scope="row", class_="name"),
        *(_difference(row.worst.get(kind)) for kind in kinds),
        id=f"layer-{row.number - 1}",
        class_=" ".join(["departing"] * row.departs + ["first"] * row.is_first) or None,
    )


def _difference(one: Comparison | None) -> str:
    if one is None:
        return _element("td", "–", class_="figure", data_value="-1")
    value = one.difference if math.isfinite(one.difference) else math.inf
    relation = "≤" if one.agrees else ">" if math.isfinite(one.difference) else "≰"
    return _element(
        "td",
        figure(one.difference),
        _element("span", f"{relation} {figure(one.tolerance)}, step {one.step}", class_="soft"),
        class_="figure" if one.agrees else "figure off",
        data_value="Infinity" if math.isinf(value) else repr(float(value)),
    )


def _departing(verdict: Verdict) -> Iterator[str]:
    departing = [one for one in verdict.comparisons if not one.agrees]
    if not departing:
        return
    head = _element(
        "tr",
        _head("step", is_figure=True, sorts=True, order="ascending"),
        _head("kind", sorts=True),
        _head("name", sorts=True),
        _head("difference", is_figure=True, sorts=True),
        _head("tolerance", is_figure=True),
    )
    rows = (
        _element(
            "tr",
            _element("td", str(one.step), class_="figure", data_value=str(one.step)),
            _element("td", one.kind.value),
            _element("td", one.name, class_="name"),
            _element(
                "td",
                figure(one.difference),
                class_="figure off",
                data_value="Infinity" if math.isnan(one.difference) else str(one.difference),
            ),
            _element("td", figure(one.tolerance), class_="figure"),
        )
        for one in departing[:_MOST_COMPARISONS]
    )
    shown = f"the first {_MOST_COMPARISONS} of " if len(departing) > _MOST_COMPARISONS else ""
    summary = (
        f"Every comparison that departs ({shown}{len(departing)} of {len(verdict.comparisons)}; "
        "all are in the report as JSON)"
    )
    yield _element("details", _element("summary", summary), _table(head, rows, id="comparisons"))


def _settings(settings: Mapping[str, Any]) -> _Markup:
    pairs = [
        part
        for name, value in settings.items()
        for part in (_element("dt", str(name)), _element("dd", setting_in_words(value)))
    ]
    return _element("dl", *pairs)
