"""The section on scaling of the results page, on the stored figures."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def section(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scaling_page").section


@pytest.fixture
def document():
    return json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))


def test_what_was_not_measured_is_said_in_a_line(section, tmp_path):
    lines = section({}, tmp_path / "images")
    assert [line for line in lines if line][1:] == [
        "Not measured: `results/scaling.json` is missing."
    ]
    assert not (tmp_path / "images").exists()


def test_the_section_has_tables_and_its_pictures(section, document, tmp_path):
    images = tmp_path / "images"
    lines = section({"scaling": document}, images)
    linked = {line.split("](../images/")[1][:-1] for line in lines if line.startswith("![")}
    assert linked == {path.name for path in images.iterdir()}
    assert len(linked) == 4
    for path in images.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    for table in _tables(lines):
        assert len({line.count("|") for line in table}) == 1, table[0]
        assert table[1].startswith("| --- |")
    assert len(_tables(lines)) >= 6


def test_the_figures_are_those_of_the_file(section, document, tmp_path):
    document["paper"]["rows"][0]["milliseconds"] = [12345.6, 23456.7]
    text = "\n".join(section({"scaling": document}, tmp_path))
    assert "12345.6 to 23456.7" in text
    chain = document["workers"]["two"]["chains"][0]
    assert f"{chain['relative_error']:+.0%}" in text


def test_pictures_are_the_same_bytes_again(section, document, tmp_path):
    for name in ("a", "b"):
        section({"scaling": document}, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_stored_figures_hold_together(document):
    """Channels are ResNet-50's, payloads the contract's, and more replicas cost no less."""
    layers = document["paper"]["layers"]
    assert len(layers) == 53
    assert sum(layers) == 26560
    assert [part["replicas"] for part in document["replicas"]] == [1, 2, 4, 8]
    for part in document["replicas"]:
        for row in part["payload"]:
            if row["variant"] == "syncbn":
                channels, many = row["channels"], part["replicas"] > 1
                assert row["forward_bytes"] == many * (2 * channels + 1) * 8
                assert row["backward_bytes"] == many * 2 * channels * 4
    for variant in ("syncbn", "keras_sync"):
        rows = [row for row in document["paper"]["rows"] if row["variant"] == variant]
        assert [row["ranks"] for row in rows] == [8 << shift for shift in range(10)]
        for end in (0, 1):
            times = [row["milliseconds"][end] for row in rows]
            assert times == sorted(times)


def _tables(lines):
    tables, table = [], []
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append(line)
        elif table:
            tables.append(table)
            table = []
    return tables
