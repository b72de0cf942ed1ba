"""What can be said of a block that cannot run here: that it parses and that its names exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.pages.blocks import Block
from tests.pages.session import BlockError

ROOT = Path(__file__).parents[2]
# What ends a command of a line, or its arguments.
_BETWEEN = {"|", "&&", "||", ";", ">", ">>", "<", "2>"}
_DOCKER = re.compile(
    r"^(?:ADD|ARG|CMD|COPY|ENTRYPOINT|ENV|EXPOSE|FROM|HEALTHCHECK|LABEL|RUN|USER|VOLUME|WORKDIR) "
)


def check(block: Block, name: str) -> None:
    """As far as that goes without running it.

    Raises:
        BlockError: It does not parse, or names what does not exist.
    """
    try:
        _CHECKS[block.language](block.text)
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        raise BlockError(f"{name}: {error}") from error


def _resolved(node: ast.expr, known: dict[str, object]) -> object | None:
    """The object of ours that an expression like `syncbn.compat.x` names; else None."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolved(node.value, known)
        if owner is None or not (inspect.ismodule(owner) or inspect.isclass(owner)):
            return None
        if not hasattr(owner, node.attr) and inspect.ismodule(owner):
            with contextlib.suppress(ModuleNotFoundError):
                return importlib.import_module(f"{owner.__name__}.{node.attr}")
        if not hasattr(owner, node.attr):
            raise ValueError(f"line {node.lineno}: {ast.unparse(node)} does not exist")
        return getattr(owner, node.attr)
    return None


def _imported(tree: ast.AST) -> dict[str, object]:
    """Names that imports of syncbn bind; all of them must exist."""
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "syncbn":
                    module = importlib.import_module(alias.name)
                    bound = alias.asname or "syncbn"
                    known[bound] = module if alias.asname else importlib.import_module("syncbn")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "syncbn":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    raise ValueError(f"{node.module} has no {alias.name}")
                known[alias.asname or alias.name] = getattr(module, alias.name)
    return known


def python(text: str) -> None:
    """Compiles; what it takes of syncbn exists, with the keywords that it passes."""
    tree = ast.parse(text)
    known = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _resolved(node, known)
        if isinstance(node, ast.Call) and (called := _resolved(node.func, known)) is not None:
            parameters = inspect.signature(called).parameters.values()
            if any(one.kind is one.VAR_KEYWORD for one in parameters):
                continue
            names = {one.name for one in parameters}
            wrong = [k.arg for k in node.keywords if k.arg is not None and k.arg not in names]
            if wrong:
                raise ValueError(f"{ast.unparse(node.func)} takes no {', '.join(wrong)}")


def commands_of(console: str) -> Iterator[tuple[str, str]]:
    """Each command of a `console` block behind its `$ `, with the output below it."""
    command, output = "", []
    for line in console.splitlines():
        if command.endswith("\\"):
            command += "\n" + line.removeprefix("> ")
        elif line.startswith("$ "):
            if command:
                yield command, "\n".join(output)
            command, output = line.removeprefix("$ "), []
        elif command:
            output.append(line)
        else:
            raise ValueError(f"a console block starts with '$ ', not {line!r}")
    if command:
        yield command, "\n".join(output)


def _ours(words: list[str]) -> None:
    """The arguments of `syncbn …` are those of its parser; all behind a program are its own."""
    from syncbn.cli import parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parser().parse_args(words)
    except SystemExit as end:
        if end.code:
            raise ValueError(f"syncbn {shlex.join(words)}: {said.getvalue()}") from end


def _extras(words: list[str]) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = {*declared["project"]["optional-dependencies"]}
    for word in words:
        for extras in re.findall(r"^syncbn\[([\w, -]+)\]", word):
            if unknown := {name.strip() for name in extras.split(",")} - known:
                raise ValueError(f"syncbn has no extra {unknown}")


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        if "=" not in word and not re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE):
            raise ValueError(f"the Makefile has no target {word}")


def command(text: str) -> None:
    """A command of a shell; of ours, pip's and make's also the arguments."""
    words = shlex.split(text, comments=True)
    one: list[str] = []
    for word in [*words, ";"]:
        if word not in _BETWEEN:
            one.append(word)
            continue
        for number, name in enumerate(one):
            if name == "syncbn":
                _ours(one[number + 1 :])
                break
            if name == "pip":
                _extras(one[number + 1 :])
        if one[:1] == ["make"]:
            _make(one[1:])
        one = []


def bash(text: str) -> None:
    """As bash reads it, without running it."""
    result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(result.stderr)
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("#"):
            continue
        try:
            shlex.split(line)
        except ValueError:  # a quote that spans lines
            continue
        command(line)


def console(text: str) -> None:
    """Every command of it."""
    for one, _ in commands_of(text):
        bash(one)
        command(one)


def _documents(text: str) -> None:
    if not [*yaml.safe_load_all(text)]:
        raise ValueError("no document")


def _dockerfile(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#") and not _DOCKER.match(line):
            raise ValueError(f"no instruction of a Dockerfile: {line}")


_CHECKS = {
    "python": python,
    "console": console,
    "bash": bash,
    "yaml": _documents,
    "json": json.loads,
    "toml": tomllib.loads,
    "dockerfile": _dockerfile,
    "text": str,
}
