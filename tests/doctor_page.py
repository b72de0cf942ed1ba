"""The tables of docs/how-to/doctor.md, from the doctor's own table of versions.

python tests/doctor_page.py    # writes them into the page, between their marks
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src")]

from syncbn.doctor import table  # noqa: E402 - after the path
from syncbn.doctor.table import scope_text  # noqa: E402

PAGE = ROOT / "docs" / "how-to" / "doctor.md"


def availability() -> str:
    lines = ["| | layers that synchronize | | known from |", "|---|---|---|---|"]
    for row in table.read().rows:
        layers = "<br>".join(
            f"`{layer}`{' (deprecated)' * (layer in row.deprecated)}" for layer in row.native
        )
        sources = "; ".join(row.sources)
        lines.append(f"| {scope_text(row.scope)} | {layers or 'none'} | {row.says} | {sources} |")
    return "\n".join(lines)


def defects() -> str:
    lines = ["| | what is wrong | instead | known from | reports |", "|---|---|---|---|---|"]
    for row in table.read().defects:
        sources = "; ".join(source for source in row.sources if source not in row.reports)
        known = {"run": "", "read": "not run; ", "report": "not run; "}[row.known] + sources
        reports = ", ".join(row.reports) or "none found"
        lines.append(f"| {row.where()} | {row.says} | {row.instead} | {known} | {reports} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as they are to be."""
    for name, made in (("availability", availability()), ("defects", defects())):
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        text, count = re.subn(
            pattern, lambda _, m=made, s=start, e=end: s + m + e, text, flags=re.S
        )
        assert count == 1, name
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
