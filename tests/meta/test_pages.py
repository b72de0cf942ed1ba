"""Pages of docs/ whose programs run, and print what the page says below them."""

import re
from pathlib import Path

import pytest
from tests.processes import python

DOCS = Path(__file__).parents[2] / "docs"
# And what they are run with.
PAGES = {
    "checkpoints": {"KERAS_BACKEND": "jax"},
    "conversion": {},
    "monitor": {},
    "recalibration": {},
    "verify": {},
    "tf-keras": {"TF_USE_LEGACY_KERAS": "1"},
}
MARK = "-- the next block --"


def blocks_of(page):
    text = (DOCS / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_program_of_a_page_prints_what_the_page_says(page, tmp_path):
    """All in one process, one after the other, as the page reads."""
    blocks = blocks_of(page)
    programs = [number for number, (language, _) in enumerate(blocks) if language == "python"]
    assert programs
    code = [blocks[number][1] for number in programs]
    printed = python(
        f"import os; os.chdir({str(tmp_path)!r})\nspace = {{'__name__': '__main__'}}\n"
        f"for code in {code!r}:\n"
        "    exec(compile(code, 'a block', 'exec'), space)\n"
        f"    print({MARK!r}, flush=True)\n",
        **PAGES[page],
    )
    *outputs, rest = printed.split(f"{MARK}\n")
    assert rest == ""
    for number, output in zip(programs, outputs, strict=True):
        following = blocks[number + 1] if number + 1 < len(blocks) else ("", "")
        if following[0] == "text":
            assert output == following[1]
