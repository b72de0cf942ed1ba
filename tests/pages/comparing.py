"""What a block printed, against what its page says."""

from __future__ import annotations

import difflib
import re

ELLIPSIS = "..."


def pattern_of(expected: str) -> re.Pattern[str]:
    """`...` matches anything within a line; alone on a line, any number of lines.

    Raises:
        ValueError: Nothing but `...` is expected, which everything matches.
    """
    if not re.sub(rf"{re.escape(ELLIPSIS)}|\s", "", expected):
        raise ValueError("an output of nothing but '...' is true of everything: say more")
    parts = []
    for line in expected.rstrip("\n").split("\n"):
        if line.strip() == ELLIPSIS:
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(".*?".join(map(re.escape, line.rstrip().split(ELLIPSIS))) + r" *\n")
    return re.compile("".join(parts))


def matches(printed: str, expected: str) -> bool:
    """Whether this was printed; spaces at the ends of lines and empty last lines do not count."""
    return bool(pattern_of(expected).fullmatch(printed.rstrip() + "\n"))


def difference(printed: str, expected: str) -> str:
    """For people: what the page says against what was printed."""
    return "\n".join(
        difflib.unified_diff(
            expected.splitlines(), printed.splitlines(), "the page", "printed", lineterm=""
        )
    )
