"""`syncbn bench` as a user runs it: table, JSON and sentence agree; bad input."""

import json
import re
import statistics

import pytest

from syncbn.bench.short import verdict_of
from syncbn.cli import main

LAYERS = ["syncbn", "keras_sync", "keras_local", "fused_local"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    options = ["--shape", "4,5,6", "--rounds", "6", "--batch", "2", "--image", "8"]
    with pytest.MonkeyPatch.context() as patch:
        printed = []

        def keep(*parts, sep=" ", **_):
            printed.append(sep.join(parts))

        patch.setattr("builtins.print", keep)
        assert main(["bench", *options, "--output", str(path)]) == 0
    return "\n".join(printed), json.loads(path.read_text())


def tables(printed):
    """The rows of each table: name, milliseconds, ratios and quartiles, bandwidth."""
    found, rows = [], None
    for line in printed.splitlines():
        if line.startswith("  ") and "times as fast" in line:
            rows = {}
            found.append(rows)
        elif rows is not None and (match := re.match(r"  (\w+)\s+(\d.*)", line)):
            rows[match[1]] = [float(number) for number in re.findall(r"\d+\.\d+", match[2])]
        else:
            rows = None
    return found


def median_of_ratios(seconds, name, other):
    return statistics.median(
        theirs / own for own, theirs in zip(seconds[name], seconds[other], strict=True)
    )


def test_every_figure_of_the_json_follows_from_its_samples(measured):
    _, document = measured
    for result in (*document["layers"], document["training"]):
        seconds = result["seconds"]
        assert {len(values) for values in seconds.values()} == {6}
        for name, figure in result["variants"].items():
            median = 1e3 * statistics.median(seconds[name])
            assert figure["milliseconds_median"] == pytest.approx(median, abs=1e-3)
            for other in ("keras_sync", "fused_local"):
                expected = median_of_ratios(seconds, name, other)
                assert figure[f"times_as_fast_as_{other}"] == pytest.approx(expected, abs=1e-3)
            assert figure["lower_quartile"] <= figure["times_as_fast_as_keras_sync"]
            assert figure["times_as_fast_as_keras_sync"] <= figure["upper_quartile"]


def test_the_tables_show_the_figures_of_the_json(measured):
    printed, document = measured
    results = [*document["layers"], document["training"]]
    shown = tables(printed)
    assert [list(rows) for rows in shown] == [LAYERS, [*LAYERS, "fused_local_again"]]
    for result, rows in zip(results, shown, strict=True):
        for name, (milliseconds, against_keras, low, high, *rest) in rows.items():
            figure = result["variants"][name]
            assert milliseconds == pytest.approx(figure["milliseconds_median"], abs=6e-3)
            assert against_keras == pytest.approx(figure["times_as_fast_as_keras_sync"], abs=6e-3)
            assert low == pytest.approx(figure["lower_quartile"], abs=6e-3)
            assert high == pytest.approx(figure["upper_quartile"], abs=6e-3)
            assert rest[0] == pytest.approx(figure["times_as_fast_as_fused_local"], abs=6e-3)
            if "bandwidth_fraction" in figure:
                assert rest[-1] == pytest.approx(100 * figure["bandwidth_fraction"], abs=6e-2)


def test_it_ends_with_the_verdict_that_follows_from_the_training_step(measured):
    printed, document = measured
    verdict = verdict_of(document["training"])
    assert document["verdict"]["sentence"] == verdict.sentence
    assert document["verdict"]["outcome"] == verdict.outcome
    assert " ".join(printed.split()).endswith(" ".join(verdict.sentence.split()))
    assert "Synchronizing" in verdict.sentence or "synchronizing" in verdict.sentence


def test_devices_and_versions_are_named_and_lines_fit_a_terminal(measured):
    printed, document = measured
    assert document["replicas"] == len(document["devices"]) == 2
    for device in document["devices"]:
        assert device in printed
    assert f"TensorFlow {document['machine']['tensorflow']}" in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "3"], "--shape must be 2 to 5 positive whole numbers by commas"),
        (["--shape", "4,0,2"], "Received: '4,0,2'"),
        (["--shape", "4,-1,2"], "Received: '4,-1,2'"),
        (["--shape", "100000,100000"], "--shape must have at most 268435456 elements"),
        (["--rounds", "5"], "--rounds must be at least 6"),
        (["--replicas", "1"], "--replicas must be at least 2"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--image", "4"], "--image must be at least 8"),
        (["--output", "no/such/folder/x.json"], "is in no folder that exists"),
        (["--output", "."], "which is a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""


def test_another_keras_backend_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    assert main(["bench"]) == 2
    assert "syncbn bench requires Keras on TensorFlow" in capsys.readouterr().err
