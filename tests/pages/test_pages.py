"""Every block of every page does what its page says; what cannot run here is well formed."""

from pathlib import Path

import pytest

from tests.pages.blocks import blocks_of, pages
from tests.pages.running import Page

ROOT = Path(__file__).parents[2]
PAGES = [page for page in pages(ROOT) if blocks_of(page)]
SLOW = [page for page in PAGES if any("engines" in block.options for block in blocks_of(page))]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_of_a_page_does_what_the_page_says(page, tmp_path):
    Page(page, tmp_path, engines=False).run()


@pytest.mark.engines
@pytest.mark.parametrize("page", SLOW, ids=name)
def test_the_slow_blocks_of_a_page_do_what_the_page_says(page, tmp_path):
    Page(page, tmp_path, engines=True).run()


def test_there_are_pages_with_blocks():
    assert {"README.md", "docs/how-to/multi-worker.md"} <= {name(page) for page in PAGES}
