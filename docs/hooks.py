"""What the pages have from the code as they are built: the help of every command."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

MARK = "<!-- every command -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """In place of the mark, the help of `syncbn` and of each of its commands."""
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """A section for each command: what `--help` prints, on 88 columns."""
    os.environ["COLUMNS"] = "88"
    from syncbn.cli import parser

    whole = parser()
    (choices,) = [a.choices for a in whole._actions if isinstance(a, argparse._SubParsersAction)]
    return "\n".join(
        f"## syncbn {name}\n\n```text\n{_plain(command.format_help())}```\n"
        for name, command in choices.items()
    )


def _plain(text: str) -> str:
    """Without the colours that Python 3.14 adds."""
    return re.sub(r"\x1b\[\d*m", "", text)
