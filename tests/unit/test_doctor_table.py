"""The doctor's table of versions by itself: no version falls in none, every row has its source."""

import itertools
import re

import pytest

from syncbn import InputError
from syncbn.doctor import of_versions, table
from syncbn.doctor.table import Subject

SOURCE = re.compile(r"(run|read) \S.*|[\w.-]+/[\w.-]+#\d+")
REPORT = re.compile(r"[\w.-]+/[\w.-]+#\d+")


def versions(first, last):
    return [(first[0], minor) for minor in range(first[1], last[1] + 1)]


def subjects():
    """Everybody that the table is to know of."""
    known = table.read()
    for number in [(1, 15), *versions((2, 0), (2, 15))]:
        yield Subject("tf.keras", "tensorflow", number)
    keras = versions((3, 0), known.last_keras)
    for number in versions((2, 16), known.last_tensorflow):
        yield Subject("tf_keras", "tensorflow", number)
        for version in keras:
            yield Subject("keras", "tensorflow", number, version)
    for backend, version in itertools.product(("jax", "torch"), keras):
        yield Subject("keras", backend, None, version)


@pytest.mark.parametrize("subject", list(subjects()), ids=str)
def test_every_version_is_in_one_row(subject):
    assert len(table.read().rows_of(subject)) == 1


def test_what_is_newer_than_the_table_is_in_no_row():
    known = table.read()
    after = (2, known.last_tensorflow[1] + 1)
    newest = (3, known.last_keras[1] + 1)
    assert known.rows_of(Subject("keras", "tensorflow", after, known.last_keras)) == []
    assert known.rows_of(Subject("tf_keras", "tensorflow", after)) == []
    assert known.rows_of(Subject("keras", "tensorflow", known.last_tensorflow, newest)) == []
    assert known.rows_of(Subject("keras", "torch", None, newest)) == []


def test_every_row_says_how_it_is_known():
    known = table.read()
    for row in (*known.rows, *known.defects):
        assert row.known in ("run", "read", "report")
        assert row.sources, row
        assert all(SOURCE.fullmatch(source) for source in row.sources), row
        # What is said to be run has been, and what is only reported says by whom.
        expected = {"run": "run ", "read": "read ", "report": ""}[row.known]
        assert any(source.startswith(expected) for source in row.sources), row
    for defect in known.defects:
        assert all(REPORT.fullmatch(report) for report in defect.reports), defect
        assert defect.known != "report" or defect.reports
        assert defect.instead
    assert len({defect.name for defect in known.defects}) == len(known.defects)


def test_every_defect_is_of_versions_that_the_table_knows():
    everybody = list(subjects())
    for defect in table.read().defects:
        assert any(defect in table.read().defects_of(subject) for subject in everybody), defect


def test_a_deprecated_layer_is_one_of_those_that_there_are():
    for row in table.read().rows:
        assert {*row.deprecated} <= {*row.native}
        assert row.write


# What the documentation of each version says (TensorFlow's release notes, and its wheels).
@pytest.mark.parametrize(
    ("tensorflow", "options", "layers", "code"),
    [
        ("1.15", {}, [], 1),
        ("2.1", {}, [], 1),
        ("2.2", {}, ["experimental."], 0),
        ("2.9.1", {}, ["experimental."], 0),
        ("2.11", {}, ["experimental."], 0),
        ("2.12", {}, ["synchronized=True", "experimental."], 0),
        ("2.15.1", {}, ["synchronized=True", "experimental."], 0),
        ("2.16.0rc1", {}, ["synchronized=True"], 0),
        ("2.16+", {}, ["synchronized=True"], 0),
        ("2.18", {"keras": "3.6"}, ["synchronized=True"], 0),
        ("2.18", {"legacy": True}, ["synchronized=True", "experimental."], 0),
        ("2.18", {"keras": "2.18"}, ["synchronized=True", "experimental."], 0),
        ("2.99", {}, [], 2),
        ("2.18", {"keras": "3.99"}, [], 2),
    ],
)
def test_the_answer_for_a_version(tensorflow, options, layers, code):
    report = of_versions(tensorflow, **options)
    native = report.row.native if report.row else ()
    assert report.exit_code == code
    assert [layer for layer in layers if any(layer in one for one in native)] == layers
    assert len(native) == len(layers)
    start = {0: "Yes: ", 1: "No: ", 2: "Cannot tell: "}[code]
    assert report.sentence.startswith(start)


def test_the_defects_of_a_version():
    def names(*arguments, **options):
        return {defect.name for defect in of_versions(*arguments, **options).defects}

    assert "unequal-sizes" in names("2.12")
    assert "unequal-sizes" not in names("2.13")
    assert "mask-ignored" in names("2.11")
    assert {"mask-ignored", "mask-local"} & names("2.13") == set()
    assert "mask-local" in names("2.18")
    assert "lost-on-save" in names("2.18", legacy=True) & names("2.12")
    assert "lost-on-save" not in names("2.18") | names("2.11")
    assert "fit-multi-worker" in names("2.16", keras="3.3")
    assert "fit-multi-worker" not in names("2.16", keras="3.2") | names("2.18", legacy=True)
    assert "moving-statistics-of-replica-0" in names("2.18", keras="3.6")
    assert "moving-statistics-of-replica-0" not in names("2.18", keras="3.7")
    assert names("2.1") == names("2.99") == set()


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("two",), {}, "numbers, as 2.9 or 2.16.1. Received: 'two'"),
        (("2",), {}, "Received: '2'"),
        (("2.9",), {"keras": "3.1"}, "Keras 3 requires TensorFlow 2.16"),
        (("2.9",), {"legacy": True}, "--legacy requires TensorFlow 2.16"),
        (("2.18",), {"keras": "x"}, "The version of Keras requires"),
    ],
)
def test_versions_that_cannot_be(arguments, options, said):
    with pytest.raises(InputError, match=re.escape(said)):
        of_versions(*arguments, **options)
