"""Recorded steps in files: those of a large model are larger than memory, and workers meet here.

The folder is temporary and the process's own; nothing else is ever read by these functions.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.files import written_whole
from syncbn.verification.measuring import Sharing
from syncbn.verification.recording import Step, Structure

__all__ = ["OnReplicas", "Steps", "in_words"]


class Steps:
    """The steps of one run.

    Args:
        folder: exists.
        name: of the run.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name

    def keep(self, number: int, before: list[Any], step: Step, structure: Structure) -> None:
        """Put one away, counted from 0."""
        # The step last: where it is, the rest is there.
        if number == 0:
            self._write("structure", structure)
        self._write(f"before-{number}", before)
        self._write(number, step)

    def has(self, number: int) -> bool:
        """Whether there is such a step."""
        return self._path(number).exists()

    def before(self, number: int) -> list[Any]:
        """All variables before that step."""
        return self._read(f"before-{number}")  # type: ignore[no-any-return]

    def step(self, number: int) -> Step:
        """What was recorded of it."""
        return self._read(number)  # type: ignore[no-any-return]

    def beside(self, name: str) -> Steps:
        """Those of another run, in the same folder."""
        return Steps(self._folder, name)

    def forget(self, number: int) -> None:
        """Give back the space of a step."""
        self._path(number).unlink()
        self._path(f"before-{number}").unlink()

    def structure(self) -> Structure:
        """What the model is made of."""
        return self._read("structure")  # type: ignore[no-any-return]

    def _write(self, what: int | str, value: Any) -> None:
        with written_whole(self._path(what)) as path, path.open("wb") as file:
            pickle.dump(value, file)

    def _read(self, what: int | str) -> Any:
        with self._path(what).open("rb") as file:
            return pickle.load(file)

    def _path(self, what: int | str) -> Path:
        return self._folder / f"{self._name}-{what}.pickle"


def _merged(steps: list[Step]) -> Step:
    """What several processes recorded of one step; the logs are the first one's."""
    whole = Step()
    for step in steps:
        for name in ("outputs", "inputs", "data", "losses", "gradients", "after"):
            getattr(whole, name).update(getattr(step, name))
    whole.logs = steps[0].logs
    return whole


def in_words(error: BaseException) -> str:
    """Its first lines; of a graph's error, which has a hundred, those that say what failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Graph execution error"):
        # The trace of Python comes first, and the reason in front of the names of nodes.
        nodes = [number for number, line in enumerate(lines) if line.startswith("[[")]
        lines = lines[nodes[0] - 1 : nodes[0] + 1] if nodes and nodes[0] else lines
    text = " ".join(lines[:2])
    return f"{type(error).__name__}: {text[:400]}{'…' * (len(text) > 400)}"


class OnReplicas(NamedTuple):
    """What became of the run on replicas.

    Attributes:
        processes: the steps of each process.
        sharing: what the results of replicas are to each other.
        devices: their names.
        repair: what syncbn has for the training on this backend.
        repaired: whether that was in effect.
        failure: what ended it before its time, or None.
    """

    processes: tuple[Steps, ...]
    sharing: Sharing
    devices: tuple[str, ...]
    repair: str
    repaired: bool
    failure: Exception | None

    def step(self, number: int) -> Step | None:
        """What all processes recorded of a step, counted from 0; None where one has not."""
        if not all(steps.has(number) for steps in self.processes):
            return None
        return _merged([steps.step(number) for steps in self.processes])

    def structure(self) -> Structure:
        """Of the model on the first process."""
        return self.processes[0].structure()
