"""docs/how-to/export.md is true: its table of folded models is that of the tests."""

import re
from pathlib import Path

from tests.tensorflow.test_folding_models import MODELS

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "export.md").read_text(encoding="utf-8")


def test_the_table_of_folded_models_is_that_of_the_tests():
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+)\b.*\|$", PAGE, flags=re.MULTILINE)
    assert {name: (int(folded), int(left)) for name, folded, left in rows} == {
        name: numbers[:2] for name, numbers in MODELS.items()
    }
