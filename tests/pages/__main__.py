"""`python -m tests.pages docs/how-to/launch.md …`: pages, run as their tests run them."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.pages.blocks import PageError
from tests.pages.running import Page
from tests.pages.session import BlockError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pages", description=__doc__)
    parser.add_argument("page", nargs="+", type=Path)
    parser.add_argument("--engines", action="store_true", help="the slow blocks too")
    arguments = parser.parse_args()
    failed = 0
    for path in arguments.page:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                Page(path, Path(folder), engines=arguments.engines).run()
                verdict = "true"
            except (BlockError, PageError) as error:
                failed, verdict = 1, f"not true\n{error}"
        print(f"{path}: {time.monotonic() - start:.0f} s, {verdict}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
