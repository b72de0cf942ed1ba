"""Every block of every page does what its page says; what cannot run here is well formed."""

import collections
import re
from pathlib import Path

import markdown
import pytest

from tests.pages.blocks import blocks_of, pages
from tests.pages.running import Page

ROOT = Path(__file__).parents[2]
PAGES = [page for page in pages(ROOT) if blocks_of(page)]
# Programs that take long, of which other tests train the like: by `make test-engines`.
LONG = {
    f"docs/how-to/{one}.md"
    for one in (
        "conversion",
        "detector",
        "from-horovod",
        "jax-torch",
        "mixed-precision",
        "multi-worker",
        "several-machines",
        "verify",
    )
}
SLOW = [page for page in PAGES if any("engines" in block.options for block in blocks_of(page))]


# How many `text` blocks of a page are no program's output: formulas, a tree of files; of launch.md
# and slurm.md lines that are of a terminal, or of a cluster.
LOOSE = {
    "CONTRIBUTING.md": 1,
    "docs/explanation/cost-model.md": 1,
    "docs/explanation/mathematics.md": 5,
    "docs/explanation/one-collective.md": 1,
    "docs/how-to/launch.md": 1,
    "docs/how-to/slurm.md": 1,
    "docs/how-to/verify.md": 1,
}


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.engines) if name(page) in LONG else page
        for page in PAGES
    ],
    ids=name,
)
def test_every_block_of_a_page_does_what_the_page_says(page, tmp_path):
    Page(page, tmp_path, engines=False).run()


@pytest.mark.engines
@pytest.mark.parametrize("page", SLOW, ids=name)
def test_the_slow_blocks_of_a_page_do_what_the_page_says(page, tmp_path):
    Page(page, tmp_path, engines=True).run()


def test_no_code_is_written_in_a_way_that_is_not_run():
    """Indented, quoted, between other marks: whatever a reader sees as a block is one of ours."""
    extensions = ["attr_list", "tables", "pymdownx.highlight", "pymdownx.superfences"]
    for page in pages(ROOT):
        text = page.read_text(encoding="utf-8")
        shown = markdown.markdown(text, extensions=extensions).count("<pre")
        assert shown == len(re.findall(r"^ *```", text, re.MULTILINE)) / 2, name(page)


def test_what_looks_like_output_and_is_not_compared_is_known():
    """A `text` block that is no program's output is counted; a new one is looked at by somebody."""
    loose = collections.Counter(
        name(page)
        for page in PAGES
        for block in blocks_of(page)
        if block.language == "text" and "stderr" not in block.options
    )
    assert loose == LOOSE


def test_there_are_pages_with_blocks():
    assert {"README.md", "docs/how-to/multi-worker.md"} <= {name(page) for page in PAGES}
