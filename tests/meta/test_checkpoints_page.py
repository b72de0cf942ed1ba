"""docs/checkpoints.md is true: its programs print what it says."""

import re
from pathlib import Path

import pytest
from tests.processes import python

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_has_its_programs():
    assert len(BLOCKS) == PAGE.count("```python") == 3


@pytest.mark.parametrize(("program", "text"), BLOCKS)
def test_every_program_prints_what_the_page_says(program, text, tmp_path):
    inside = f"import os; os.chdir({str(tmp_path)!r})\n{program}"
    assert python(inside, KERAS_BACKEND="jax") == text
