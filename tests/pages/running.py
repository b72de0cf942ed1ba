"""Runs a page: its blocks in order, in one folder, each as the comment above it says."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from tests.pages import static
from tests.pages.blocks import Block, PageError, blocks_of
from tests.pages.comparing import difference, matches
from tests.pages.session import LIMIT, BlockError, Session, end, environment


def _compare(printed: str, expected: str | None, name: str) -> None:
    try:
        agrees = expected is None or matches(printed, expected)
    except ValueError as error:
        raise BlockError(f"{name}: {error}") from error
    if not agrees:
        raise BlockError(f"{name} prints something else:\n{difference(printed, expected or '')}")


def shell(command: str, folder: Path, backend: str, name: str) -> tuple[int, str, str]:
    """The exit code of a command, and what it printed to stdout and to stderr."""
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(backend),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise BlockError(f"{name}: {command} ran past {LIMIT} s") from error
    finally:
        end(process)
    return process.returncode, stdout, stderr


class Page:
    """One run of a page.

    Args:
        folder: an empty folder, where its programs run.
        engines: whether the slow blocks run too; else they are checked without running.
    """

    def __init__(self, path: Path | str, folder: Path, *, engines: bool):
        self._blocks = blocks_of(path)
        self._name = path.name if isinstance(path, Path) else "page"
        self._folder = folder
        self._engines = engines
        self._sessions = contextlib.ExitStack()
        self._of_backend: dict[str, Session] = {}
        self._files: set[str] = set()
        self._said = ""

    def run(self) -> None:
        """All of it.

        Raises:
            BlockError: A block fails, or prints what the page does not say.
            PageError: The page is not written by the convention.
        """
        with self._sessions:
            for block in self._blocks:
                self._run(block, f"{self._name}:{block.line}")
        run = [block for block in self._blocks if "not run" not in block.options]
        commands = "\n".join(block.text for block in run if block.language in {"console", "bash"})
        for file in self._files:
            if file.endswith(".py") and file not in commands:
                raise PageError(f"{self._name}: {file} is written and no console block runs it")

    def _run(self, block: Block, name: str) -> None:
        if "not run" in block.options and block.output is not None:
            raise PageError(f"{name}: what is not run prints nothing that could be compared")
        if block.title:
            path = self._folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            self._files.add(block.title)
        waits = "engines" in block.options and not self._engines
        if "not run" in block.options or waits or block.title:
            static.check(block, name)
        elif block.language == "python":
            self._python(block, name)
        elif block.language == "console":
            self._console(block, name)
        elif block.language == "bash":
            raise PageError(f"{name}: a bash block has a title, or says why it is not run")
        elif "stderr" in block.options and block.text not in self._said:
            raise BlockError(f"{name} is not what was said to stderr:\n{self._said[-4000:]}")
        else:
            static.check(block, name)

    def _python(self, block: Block, name: str) -> None:
        if "workers" in block.options:
            self._launch(block, name)
            return
        stdout, self._said = self._session(block).run(block.text, name)
        _compare(stdout, block.output, name)

    def _session(self, block: Block) -> Session:
        if "alone" in block.options:
            return self._sessions.enter_context(Session(self._folder, block.backend))
        if block.backend not in self._of_backend:
            session = self._sessions.enter_context(Session(self._folder, block.backend))
            self._of_backend[block.backend] = session
        return self._of_backend[block.backend]

    def _launch(self, block: Block, name: str) -> None:
        """The block as a program on workers; of its output the order of lines is any."""
        program = self._folder / f"block-{block.line}.py"
        program.write_text(block.text, encoding="utf-8")
        backend = block.backend if block.backend in {"jax", "torch"} else "tensorflow"
        command = (
            f"syncbn launch --workers {block.options['workers']} --backend {backend} {program.name}"
        )
        code, stdout, stderr = shell(command, self._folder, block.backend, name)
        if code:
            raise BlockError(f"{name}: {command} ended with {code}\n{stdout}{stderr[-4000:]}")
        missing = {*(block.output or "").splitlines()} - {*stdout.splitlines()}
        if missing:
            raise BlockError(f"{name}: no worker printed {sorted(missing)}\n{stdout}")

    def _console(self, block: Block, name: str) -> None:
        static.check(block, name)
        wanted = int(block.options.get("exit", "0"))
        for command, expected in static.commands_of(block.text):
            code, stdout, stderr = shell(command, self._folder, block.backend, name)
            if code != wanted:
                raise BlockError(
                    f"{name}: {command} ended with {code}, not {wanted}\n{stdout}{stderr[-4000:]}"
                )
            printed = stdout + stderr if "stderr" in block.options else stdout
            if "any order" in block.options:
                printed, expected = ("\n".join(sorted(x.splitlines())) for x in (printed, expected))
            _compare(printed, expected or None, f"{name}: {command}")
