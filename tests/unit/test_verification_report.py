"""The reports of a verification; test_verification_page opens its page in a browser."""

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests import verdicts

from syncbn.errors import InputError
from syncbn.verification import document, page, picture, rows, text
from syncbn.verification.verdict import Cause, Comparison, Finding, Kind, Layer, Outcome, Verdict

ALL = {
    "agrees": verdicts.agreeing(),
    "departs with NaN": verdicts.departing(nan_from=6),
    "one layer": verdicts.departing(1, at=0, steps=1),
    "200 layers": verdicts.departing(200, at=80),
    "cannot tell": verdicts.telling_nothing(),
    "strange names": verdicts.strange(),
}
every_verdict = pytest.mark.parametrize("verdict", ALL.values(), ids=ALL.keys())


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


@every_verdict
def test_the_first_line_has_the_outcome_and_no_line_is_wider_than_100(verdict):
    lines = str(verdict).splitlines()
    assert lines[0].startswith(verdict.outcome.word.upper() + ": ")
    assert max(map(len, lines)) <= 100
    for finding in verdict.findings:
        assert finding.cause.value in str(verdict)
    assert not re.search(r"[^\n\x20-\x7e\xa0-\U0010ffff]", str(verdict))


def test_each_layer_has_its_differences_tolerances_steps_and_mark():
    said = str(ALL["departs with NaN"])
    for number, layer in enumerate(ALL["departs with NaN"].layers, start=1):
        assert f"{number} {layer.path}" in said
    assert said.count("DEPARTS FIRST") == 1
    block = said[said.index("5 stage1_block2_bn") : said.index("6 stage1_block2_relu")]
    worst = ALL["departs with NaN"].worst(Kind.OUTPUT, "stage1_block2_bn")
    assert f"! {worst.difference:.2g} @{worst.step}" in block
    assert f"> {worst.tolerance:.2g}" in block
    assert "DEPARTS FIRST" in block
    assert "! NaN @2" in said
    assert "What to do: Take syncbn.SyncBatchNormalization" in said


def test_deep_models_are_folded_around_the_first_that_departs_and_no_layer_is_left_out():
    verdict = ALL["200 layers"]
    assert len(str(verdict).splitlines()) < 90
    shown = rows.folded(rows.rows_of(verdict))
    numbers = [
        row.number
        for part in shown
        for row in (part.rows if isinstance(part, rows.Fold) else [part])
    ]
    assert numbers == list(range(1, 201))
    single = {part.number: part for part in shown if isinstance(part, rows.Row)}
    assert {80, *range(81, 89)} <= single.keys()
    assert single[81].is_first
    whole = text.as_text(verdict, every=True)
    assert all(f"{number} {layer.path}" in whole for number, layer in enumerate(verdict.layers, 1))


def test_a_fold_hides_no_departure():
    """Where gradients alone depart, every third layer agrees: the runs say how many depart."""
    folds = [
        part
        for part in rows.folded(rows.rows_of(ALL["200 layers"]))
        if isinstance(part, rows.Fold) and any(row.departs for row in part.rows)
    ]
    assert folds
    for fold in folds:
        assert "depart" in fold.words
        assert any(not one.agrees for one in fold.worst.values())
    agreeing = rows.folded(rows.rows_of(verdicts.agreeing(200)))
    assert any(isinstance(part, rows.Fold) and " agree " in part.words for part in agreeing)


def test_columns_that_do_not_fit_give_way_and_are_told_in_words():
    verdict = ALL["departs with NaN"]
    narrow = text.as_text(verdict, width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "No room above for spread over replicas; at worst 0.1" in narrow.replace("\n", " ")
    assert "No room above" not in text.as_text(verdict)


def test_what_belongs_to_no_layer_is_shown_too():
    comparisons = (
        Comparison(Kind.GRADIENT, "scale", "", 1, 0.5, 1e-6),
        Comparison(Kind.OUTPUT, "hidden", "hidden", 1, 0.25, 1e-6),
    )
    verdict = Verdict(Outcome.DEPARTS, "It departs.", comparisons=comparisons)
    for report in (str(verdict), page.as_html(verdict)):
        assert rows.MODEL in report
        assert "hidden" in report
        assert "0.25" in report
        assert "0.5" in report


def test_a_terminal_gets_colours_a_pipe_and_no_color_do_not(terminal, monkeypatch):
    verdict = ALL["departs with NaN"]
    text.show(verdict, terminal)
    assert "\x1b[1;31mDEPARTS: " in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain_terminal = Terminal()
    text.show(verdict, plain_terminal)
    assert "DEPARTS FIRST" in plain_terminal.getvalue()
    assert not re.search(r"\x1b\[[\d;]*3[0-7]m", plain_terminal.getvalue())
    pipe = io.StringIO()
    text.show(verdict, pipe)
    assert pipe.getvalue() == str(verdict) + "\n"


def test_a_terminal_takes_names_as_they_are(terminal):
    text.show(ALL["strange names"], terminal)
    assert "[/nothing]" in terminal.getvalue()
    assert "\x1b[31mred" not in terminal.getvalue()
    assert r"\x1b[31mred" in terminal.getvalue()


def test_a_console_without_the_letters_gets_others():
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", write_through=True) as file:
        text.show(ALL["departs with NaN"], file)
        assert b"DEPARTS FIRST" in raw.getvalue()


def test_text_and_document_need_no_other_package(tmp_path):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("rich", "matplotlib", "numpy", "keras")))
from syncbn.verification import document, page, text
verdict = document.read_json({str(tmp_path / "a.json")!r})
text.show(verdict)
try:
    page.check_page("a.html")
except ValueError as error:
    print(error)"""
    document.write_json(ALL["one layer"], tmp_path / "a.json")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(ALL["one layer"]))
    assert "A report as HTML requires matplotlib." in done.stdout


@every_verdict
def test_a_document_gives_the_same_verdict_again(verdict, tmp_path):
    document.write_json(verdict, tmp_path / "report.json")
    again = document.read_json(tmp_path / "report.json")
    # NaN is not itself: by their words.
    assert repr(again) == repr(verdict)
    assert str(again) == str(verdict)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@every_verdict
def test_a_document_is_strict_json_with_enumerations_as_words(verdict, tmp_path):
    def refused(name):
        raise AssertionError(name)

    document.write_json(verdict, tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refused)
    assert found["schema"] == document.SCHEMA
    assert found["outcome"] == verdict.outcome.word
    assert found["exit_code"] == verdict.exit_code
    assert (found["first_departure"] is None) == (verdict.first_departure is None)
    for of_document, one in zip(found["comparisons"], verdict.comparisons, strict=True):
        assert of_document["agrees"] is one.agrees
        assert (of_document["difference"] is None) == math.isnan(one.difference)


def test_numbers_that_json_has_not_survive():
    comparisons = tuple(
        Comparison(Kind.LOSS, "loss", "", 1, value, math.inf)
        for value in (math.nan, math.inf, -math.inf, 1e-300)
    )
    verdict = Verdict(
        Outcome.DEPARTS, "It departs.", comparisons=comparisons, settings={"rate": [math.nan, 1]}
    )
    found = json.loads(json.dumps(document.as_dict(verdict), allow_nan=False))
    assert [one["difference"] for one in found["comparisons"]] == [
        *(None, "Infinity", "-Infinity"),
        1e-300,
    ]
    assert repr(document.from_dict(found).comparisons) == repr(comparisons)
    assert found["settings"] == {"rate": [None, 1]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 99}, "schema 1. Received: format 'syncbn.verify' and schema 99"),
        ({"format": "other"}, "Received: format 'other'"),
        ({"outcome": "perhaps"}, "KeyError: 'perhaps'"),
        ({"layers": [{}]}, "KeyError: 'path'"),
        ({"comparisons": None}, "TypeError"),
    ],
)
def test_another_document_is_refused(change, said):
    with pytest.raises(InputError, match=re.escape(said)):
        document.from_dict({**document.as_dict(ALL["agrees"]), **change})


def test_a_file_that_is_no_document_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    for name in ("list.json", "broken.json", "missing.json"):
        with pytest.raises(InputError, match="A report of syncbn verify requires"):
            document.read_json(tmp_path / name)


@pytest.mark.parametrize("write", [document.write_json, page.write_page])
def test_a_disk_that_is_full_leaves_the_report_of_before(write, tmp_path, monkeypatch):
    path = tmp_path / "report"
    path.write_text("before")
    put = Path.open

    def open_full(self, *arguments, **how):
        with put(self, *arguments, **how) as file:
            file.write(b"half" if "b" in file.mode else "half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", lambda self, _: open_full(self, "wb"))
    monkeypatch.setattr(Path, "write_text", lambda self, _, **how: open_full(self, "w", **how))
    with pytest.raises(OSError, match="No space left"):
        write(ALL["one layer"], path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_settings_that_json_has_not_leave_nothing(tmp_path):
    bad = Verdict(Outcome.AGREES, "It agrees.", settings={"what": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        document.write_json(bad, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing/a.html", "No such file"), (".", "it is a folder"), ("x" * 300, "too long")],
)
def test_a_path_that_cannot_be_written_is_refused_beforehand(name, said, tmp_path):
    with pytest.raises(InputError, match=said):
        page.check_page(tmp_path / name)
    assert not list(tmp_path.iterdir())
    page.check_page(tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def a_verdict(*comparisons, findings=()):
    layers = tuple(Layer(name, "", at, "float32") for at, name in enumerate("abc", start=1))
    return Verdict(Outcome.DEPARTS, "", findings, layers, comparisons)


def test_it_departs_first_where_a_step_computes_first():
    def off(kind, layer, step, difference=1.0):
        return Comparison(kind, layer, layer, step, difference, 0.1)

    late, early = off(Kind.OUTPUT, "a", 2), off(Kind.OUTPUT, "b", 1)
    agreeing = off(Kind.OUTPUT, "a", 1, 0.01)
    backwards = [off(Kind.GRADIENT, name, 1) for name in "abc"]
    assert a_verdict(agreeing).first_departure is None
    assert a_verdict(late, *backwards, agreeing, early).first_departure is early
    # Gradients are computed from the last layer to the first.
    assert a_verdict(late, *backwards).first_departure is backwards[2]
    nan = off(Kind.OUTPUT, "c", 1, math.nan)
    assert a_verdict(nan, *backwards).first_departure is nan
    found = Finding(Cause.LOCAL, "a", 2, "", "")
    assert a_verdict(early, late, findings=(found,)).first_departure is late


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (0.0, "0 exactly"),
        (1e-300, "under 1/1000 of the tolerance"),
        (0.05, "under 1/10"),
        (1.0, "up to the tolerance"),
        (1.0001, "up to 10 times"),
        (1e9, "more"),
        (math.nan, "NaN or infinite"),
        (math.inf, "NaN or infinite"),
    ],
)
def test_the_colour_is_that_of_the_difference_by_the_tolerance(difference, words):
    one = Comparison(Kind.OUTPUT, "a", "a", 1, difference, 1.0)
    shade = picture.shade_of(one)
    assert shade.words == words
    red, blue = int(shade.colour[1:3], 16), int(shade.colour[5:7], 16)
    if math.isfinite(difference) and difference:
        assert (blue > red) == one.agrees


def cells(verdict):
    return {
        (one.kind, one.layer, one.step)
        for one in verdict.comparisons
        if one.kind in rows.LAYER_KINDS
    }


@every_verdict
def test_the_picture_has_a_cell_for_each_kind_layer_and_step(verdict):
    drawn = picture.drawn(verdict)
    if not verdict.layers:
        assert drawn == ""
        return
    svg = ElementTree.fromstring(drawn)
    found = [group for group in svg.iter() if group.get("class") == "cell"]
    assert len(found) == len(cells(verdict))
    assert len({group.find("{*}title").text for group in found}) == len(found)
    for element in svg.iter():
        assert not {"style", "id", "href", "onclick"} & set(element.attrib)
        assert element.tag.rpartition("}")[2] in {"svg", "g", "path", "text", "title"}


def test_many_steps_share_lines_each_with_the_worst_of_its_steps():
    layer = Layer("a", "", 1, "float32")
    comparisons = tuple(
        Comparison(Kind.OUTPUT, "a", "a", step, 3.0 if step == 77 else 0.5, 1.0)
        for step in range(1, 101)
    )
    drawn = picture.drawn(Verdict(Outcome.DEPARTS, "", (), (layer,), comparisons))
    assert drawn.count('class="cell"') == 15
    assert drawn.count(": departs; 3, tolerance 1, 3 times that") == 1
    assert "1–7" in drawn


@pytest.mark.parametrize("verdict", [ALL["strange names"], ALL["cannot tell"]])
def test_a_page_is_the_same_every_time_and_names_nothing_outside(verdict):
    made = page.as_html(verdict)
    assert made == page.as_html(verdict)
    outside = {one.replace("&quot;", "") for one in re.findall(r"https?://[^\s\"'<&]+", made)}
    assert outside <= {
        *("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"),
        "http://example.invalid/x",
    }
    assert "default-src &#x27;none&#x27;" in made
    assert "unsafe" not in made
