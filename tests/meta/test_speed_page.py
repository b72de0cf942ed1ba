"""docs/reference/speed.md is what page.py makes of the stored figures; the README quotes it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PAGE = (DOCS / "reference" / "speed.md").read_text(encoding="utf-8")


def made(results, folder):
    """The page of these results, its plots beside it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "page.py"), "--results", str(results)]
    result = subprocess.run(
        [*command, "--docs", str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return (folder / "reference" / "speed.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    return made(RESULTS, folder), folder


def test_the_page_is_made_of_the_stored_figures(again):
    assert again[0] == PAGE, "run `.venv/bin/python benchmarks/page.py`"


def test_its_plots_are_those_of_the_stored_figures(again):
    linked = re.findall(r"\]\(\.\./images/([\w-]+\.png)\)", PAGE)
    assert len(linked) >= 3
    for name in linked:
        with (
            Image.open(DOCS / "images" / name) as stored,
            Image.open(again[1] / "images" / name) as new,
        ):
            assert stored.size == new.size
            # Another version of the drawing library may place a line a fraction of a pixel off.
            pictures = (np.asarray(one.convert("L"), dtype=float) for one in (stored, new))
            assert np.abs(np.subtract(*pictures)).mean() < 1, name


def test_every_picture_is_of_the_page():
    linked = {
        page.stem: set(re.findall(r"images/([\w-]+\.png)", page.read_text(encoding="utf-8")))
        for page in DOCS.glob("**/*.md")
    }
    of_others = set.union(*(names for page, names in linked.items() if page != "speed"))
    found = {path.name for path in (DOCS / "images").glob("*.png")}
    assert found - of_others == linked["speed"]


def test_another_figure_makes_another_page(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    document = json.loads((results / "layer.json").read_text())
    ours = document["results"][0]["variants"]["syncbn"]
    for key in ("times_as_fast_as_keras_sync", "lower_quartile", "upper_quartile"):
        ours[key] = 7.77
    (results / "layer.json").write_text(json.dumps(document))
    text = made(results, tmp_path / "docs")
    row = next(line for line in text.splitlines() if line.startswith("| [16, 56, 56, 64] × 2"))
    assert row.endswith("| 7.77 times (7.77 to 7.77) | yes |")


def test_a_missing_file_is_named(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(RESULTS / "layer.json", results)
    text = made(results, tmp_path / "docs")
    assert "There are no figures of `benchmarks/workers.py`: run it." in text
    assert "| not measured | – |" in text


def test_the_figures_of_the_readme_are_on_the_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Speed\n(.*?)^## ", readme, flags=re.MULTILINE | re.DOTALL)[1]
    spreads = re.findall(r"\d+\.\d+ \(\d+\.\d+ to \d+\.\d+\)", section)
    assert spreads, "the section names no figure with its spread"
    figures = {*spreads, *re.findall(r"\b\d+\.\d\d\b", section)}
    assert sorted(figure for figure in figures if figure not in PAGE) == []


def targets(**documents):
    """The table of the targets of these documents, read by the page's own module."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import page_targets; "
        "print('\\n'.join(page_targets.targets_section(json.loads(sys.argv[2]))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "benchmarks"), json.dumps(documents)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict"),
    [
        (2.4, 2.35, 2.5, "yes |"),
        (2.4, 2.2, 2.5, "yes, within the spread |"),
        (2.2, 2.0, 2.4, "**no**, within the spread |"),
        (2.2, 2.0, 2.25, "**no** |"),
    ],
)
def test_whether_a_target_is_reached_follows_from_the_figures(ratio, low, high, verdict):
    figure = {
        "times_as_fast_as_keras_sync": ratio,
        "lower_quartile": low,
        "upper_quartile": high,
    }
    rows = targets(workers={"variants": {"syncbn": figure}})
    (row,) = [cells for cells in rows if cells[0].startswith("| 2 workers")]
    assert row[1:] == [
        "≥ 2.3 times as fast",
        f"{ratio:.2f} times ({low:.2f} to {high:.2f})",
        verdict,
    ]


def test_a_limit_is_not_to_be_exceeded():
    peaks = {"megabytes_median": 105, "lower_quartile": 104, "upper_quartile": 106}
    fused = {"megabytes_median": 100, "lower_quartile": 99, "upper_quartile": 101}
    for more, verdict in ((0, "yes"), (1, "**no**")):
        found = {
            "syncbn": {**peaks, "megabytes_median": 105 + more},
            "fused_local": fused,
        }
        stacks = {"relu_stack": found, "deep_stack": {}}
        rows = targets(memory={"results": {"resident": stacks}})
        (row,) = [cells for cells in rows if "relu between" in cells[0]]
        assert row[-1].startswith(verdict)
