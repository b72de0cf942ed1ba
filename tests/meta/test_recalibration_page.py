"""docs/recalibration.md is true: its program prints what it says."""

import re
from pathlib import Path

from tests.processes import python

PAGE = (Path(__file__).parents[2] / "docs" / "recalibration.md").read_text(encoding="utf-8")


def test_the_program_prints_what_the_page_says():
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (text,) = re.findall(r"^```text\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert python(code, KERAS_BACKEND="tensorflow") == text
