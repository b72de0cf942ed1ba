"""docs/how-to/multi-worker.md is true: its programs run, one on workers; it lists the repairs."""

import re
from pathlib import Path

import pytest
from tests.processes import python

from syncbn.multi_worker import REPAIRS

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "multi-worker.md").read_text()
BLOCKS = re.findall(r"^```([\w ]+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
ALONE = [number for number, (language, _) in enumerate(BLOCKS) if language == "python"]


@pytest.mark.parametrize("number", ALONE)
def test_every_block_runs(number):
    printed = python(BLOCKS[number][1], KERAS_BACKEND="tensorflow")
    for language, text in BLOCKS[number + 1 : number + 2]:
        assert language != "text" or printed == text


@pytest.mark.multiprocess
def test_the_program_for_workers_runs_on_two_workers(launch):
    (code,) = [code for language, code in BLOCKS if language == "python workers"]
    result = launch(code, "--workers", "2").run(100)
    assert result.returncode == 0, result.stderr
    assert {"[0] (200, 3) 3", "[1] (200, 3) 3"} <= set(result.stdout.splitlines())


def test_the_table_is_the_catalogue():
    def issue(address):
        if not address.startswith("https://"):
            return address
        _, _, _, _, repository, _, number = address.split("/")
        return f"[{repository}#{number}]({address})"

    rows = [f"| `{r.name}` | {r.mends} | {issue(r.issue)} |" for r in REPAIRS]
    table = PAGE.split("<!-- repairs -->\n")[1].split("\n<!-- /repairs -->")[0]
    assert table.splitlines()[2:] == rows
