"""The fenced blocks of a page, with what the comment above each says of how it is to be run.

````text
<!-- block: jax; engines -->
```python title="train.py"
```
````

OPTIONS are listed below, in `OPTIONS`; CONTRIBUTING.md says what they mean to who writes a page.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

# What a fence may name: how a block is run, or written to the file of its title.
LANGUAGES = ("python", "console", "text", "yaml", "json", "toml", "bash", "dockerfile")
# Name of an option -> whether it takes a value.
OPTIONS = {
    "jax": False,
    "torch": False,
    "tf_keras": False,
    "alone": False,
    "workers": True,
    "exit": True,
    "any order": False,
    "stderr": False,
    "engines": False,
    "not run": True,
}
BACKENDS = ("jax", "torch", "tf_keras")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")
_INFO = re.compile(r'^(?P<language>\w+)(?: title="(?P<title>[\w./-]+)")?$')
_OPTIONS = re.compile(r"^ *<!-- block: (?P<options>.*?) -->$")


class PageError(ValueError):
    """A page is not written by the convention; says where and how it is written."""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: the number of its fence's line in the page, from 1.
        language: one of `LANGUAGES`.
        title: the file that it is written to, or None.
        options: what the comment above it says.
        text: what stands between the fences, without their indentation.
        output: of a Python block what the `text` block behind it says that it prints, or None.
    """

    line: int
    language: str
    title: str | None
    options: dict[str, str]
    text: str
    output: str | None = None

    @property
    def backend(self) -> str:
        return next((name for name in BACKENDS if name in self.options), "tensorflow")


def _options_of(comment: str, where: str) -> dict[str, str]:
    options = {}
    for part in comment.split(";"):
        name, *rest = re.split(r"\s*[=:]\s*", part.strip(), maxsplit=1)
        value = "".join(rest)
        if name not in OPTIONS:
            raise PageError(f"{where}: no option {name!r}; there are {', '.join(OPTIONS)}")
        if OPTIONS[name] != bool(value):
            needs = "needs a value" if OPTIONS[name] else f"takes no value, not {value!r}"
            raise PageError(f"{where}: the option {name!r} {needs}")
        options[name] = value
    return options


def _fenced(lines: list[str], page: str) -> list[tuple[int, int]]:
    """First and last line of each block, numbered from 0; every fence belongs to one of them."""
    fences = [number for number, line in enumerate(lines) if _FENCE.match(line)]
    if len(fences) % 2:
        raise PageError(f"{page}:{fences[-1] + 1}: a fence that nothing closes")
    pairs = list(zip(fences[::2], fences[1::2], strict=True))
    for _, last in pairs:
        if _FENCE.match(lines[last])["info"]:
            raise PageError(f"{page}:{last + 1}: a block within a block")
    return pairs


def _with_outputs(blocks: list[Block], lines: list[str], ends: list[int]) -> list[Block]:
    """The blocks; a `text` block right behind a Python block is that one's output."""
    joined: list[Block] = []
    for number, block in enumerate(blocks):
        before = blocks[number - 1] if number else None
        if (
            before
            and (block.language, before.language) == ("text", "python")
            and before.title is None
            and "stderr" not in block.options
            and not "".join(lines[ends[number - 1] + 1 : block.line - 1]).strip()
        ):
            joined[-1] = Block(**{**vars(before), "output": block.text})
        else:
            joined.append(block)
    return joined


def blocks_of(page: Path | str) -> list[Block]:
    """Every block of a page, given by its file or by its text.

    Raises:
        PageError: A fence is not closed, names no known language, or has an unknown option above.
    """
    name = page.name if isinstance(page, Path) else "page"
    lines = (page.read_text(encoding="utf-8") if isinstance(page, Path) else page).splitlines()
    blocks, ends = [], []
    pairs = _fenced(lines, name)
    above = {first - 1 for first, _ in pairs}
    inside = {number for first, last in pairs for number in range(first, last)}
    for number, line in enumerate(lines):
        if _OPTIONS.match(line) and number not in above | inside:
            raise PageError(f"{name}:{number + 1}: options of a block stand right above a block")
    for first, last in pairs:
        where = f"{name}:{first + 1}"
        info = _INFO.match(_FENCE.match(lines[first])["info"])
        if not info or info["language"] not in LANGUAGES:
            raise PageError(
                f'{where}: a fence is ```LANGUAGE or ```LANGUAGE title="FILE", LANGUAGE one of '
                f"{', '.join(LANGUAGES)}; this is {lines[first].strip()!r}"
            )
        comment = _OPTIONS.match(lines[first - 1]) if first else None
        text = textwrap.dedent("\n".join(lines[first + 1 : last])) + "\n"
        options = _options_of(comment["options"], where) if comment else {}
        blocks.append(Block(first + 1, info["language"], info["title"], options, text))
        ends.append(last)
    return _with_outputs(blocks, lines, ends)


def pages(root: Path) -> list[Path]:
    """Every page whose blocks are run."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
