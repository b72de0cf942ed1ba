"""What the processes agree on before each global batch: who brings how many rows.

Each says what it has (rows, their structure), that it has no more, or what went wrong, and hears
all others, with a timeout. So that nobody enters a step that another does not: an unequal number
of batches, a failed input or a lost process are known before the collective that would hang.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from syncbn.errors import InputError, WorkerError

__all__ = ["Agreement", "Board", "Part"]


class Board(Protocol):
    """Texts of all processes, by key."""

    process: int
    processes: int

    def tell(self, key: str, text: str) -> None:
        """Leaves this process's text; it waits for nobody."""

    def hear(self, key: str, topic: str, seconds: float) -> list[str]:
        """The texts of all processes, in their order."""

    def forget(self, key: str) -> None:
        """Removes all texts of a key."""


class Part(NamedTuple):
    """What one process brings to a global batch."""

    rows: int
    structure: str | None  # None: it has no more


class Agreement:
    """The talk of one data set, in the same order on all processes."""

    def __init__(self, board: Board, name: str, seconds: float) -> None:
        self._board, self._name, self._seconds = board, name, seconds
        self._last: str | None = None
        self._number = 0

    @property
    def process(self) -> int:
        """This one."""
        return self._board.process

    def exchange(self, topic: str, message: Any) -> list[Any]:
        """The messages of all processes.

        Raises:
            WorkerError: a process did not come in time, failed, or is at another topic.
        """
        key = f"{self._name}/{self._number}"
        self._board.tell(key, json.dumps([topic, message]))
        self._number += 1
        answers = [json.loads(text) for text in self._board.hear(key, topic, self._seconds)]
        # Everybody who is here has heard the exchange before, so that it can go.
        if self._last is not None and self._board.process == 0:
            self._board.forget(self._last)
        self._last = key
        for process, (other, answer) in enumerate(answers):
            if isinstance(answer, dict) and "error" in answer:
                raise WorkerError(
                    f"Every process must bring its part of {topic}. Process {process} failed "
                    f"while it made its own: {answer['error']}"
                )
            if other != topic:
                raise WorkerError(
                    "All processes must use their data sets in the same order. Process "
                    f"{process} is at {other}, this one ({self._board.process}) at {topic}: "
                    "call fit, evaluate and predict alike everywhere, and stop alike."
                )
        return [answer for _, answer in answers]

    def fail(self, topic: str, error: BaseException) -> None:
        """Tells the others that this process brings nothing any more, and why."""
        text = json.dumps([topic, {"error": f"{type(error).__name__}: {error}"}])
        self._board.tell(f"{self._name}/{self._number}", text)
        self._number += 1

    def parts(self, topic: str, own: Part) -> list[Part]:
        """What each process brings; their structures are the same.

        Raises:
            InputError: the structures differ.
        """
        parts = [Part(*answer) for answer in self.exchange(topic, own)]
        first = next(_with_rows(parts), None)
        for process, part in _with_rows(parts):
            if first is not None and part.structure != first[1].structure:
                raise InputError(
                    "All processes must bring the same structure, dtypes and shapes (apart from "
                    f"the rows) to {topic}. Received from process {first[0]}: "
                    f"{first[1].structure}, from process {process}: {part.structure}."
                )
        return parts


def _with_rows(parts: list[Part]) -> Iterator[tuple[int, Part]]:
    return ((process, part) for process, part in enumerate(parts) if part.structure is not None)
