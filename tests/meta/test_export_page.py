"""docs/how-to/export.md is true: its program prints what the page says and the line shown."""

import re
import subprocess
import sys
from pathlib import Path

from tests.tensorflow.test_folding_models import MODELS

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "export.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```([\w ]+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_program_of_folding_prints_what_the_page_says():
    (code,) = [code for language, code in BLOCKS if language == "python" and "plan_folding" in code]
    at = BLOCKS.index(("python", code))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert ("text", result.stdout) == BLOCKS[at + 1]
    assert BLOCKS[at + 2][0] == "text stderr"
    assert BLOCKS[at + 2][1] in result.stderr


def test_the_table_of_folded_models_is_that_of_the_tests():
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+)\b.*\|$", PAGE, flags=re.MULTILINE)
    assert {name: (int(folded), int(left)) for name, folded, left in rows} == {
        name: numbers[:2] for name, numbers in MODELS.items()
    }
