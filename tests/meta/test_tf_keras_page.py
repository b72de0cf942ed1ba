"""docs/tf-keras.md is true: its programs, one after the other, print what it says."""

import re
from pathlib import Path

from tests.processes import python

PAGE = (Path(__file__).parents[2] / "docs" / "tf-keras.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_programs_of_the_page_print_what_it_says(tmp_path):
    """In one process, as the page reads: starting TensorFlow is most of the time."""
    code = "".join(text for language, text in BLOCKS if language == "python")
    expected = "".join(text for language, text in BLOCKS if language == "text")
    assert expected.count("\n") == 2
    changed = f"import os\nos.chdir({str(tmp_path)!r})\n{code}"
    assert python(changed, TF_USE_LEGACY_KERAS="1") == expected
