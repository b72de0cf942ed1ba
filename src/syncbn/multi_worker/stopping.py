"""Stopping within an epoch: all workers after the same batch, and no message until one asks.

Keras leaves its loop where `model.stop_training` is set; where one worker sets it alone, the others
wait for it in the next step. Here who asks says so on the board and waits for an answer of each
worker: the number of the batch that it can no longer avoid. The largest is the last batch of all.
The others answer from their watching threads, as they are stuck in the next step at the latest.
Where all ask after the same batch, all stop after it, as one device does; else one batch later.
"""

from __future__ import annotations

import threading

from syncbn.multi_worker.board import Board
from syncbn.multi_worker.progress import progress

__all__ = ["Stops"]


class Stops:
    """This worker's part of the agreement on the last batch.

    A loop is named by the moment after each of its batches, as `on_train_batch_end`: one loop may
    run inside another, in a callback.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self._lock = threading.Lock()
        self._answered = 0  # how many requests this worker has answered
        self._decided = 0  # and of how many it knows the outcome
        self._last: dict[str, int] = {}

    def after_batch(self, loop: str, asked: bool) -> bool:
        """Whether the loop ends after this batch; `asked`: whether this worker wants it to."""
        if asked and loop not in self._last:
            self._ask(loop)
        while True:
            self._decide()
            with self._lock:
                if self._answered > self._decided:
                    continue  # the thread has answered a moment ago
                if loop in self._last and progress.batches >= self._last[loop]:
                    return True
                progress.batches += 1
                return False

    def after_loop(self, loop: str) -> bool:
        """Whether someone asked to end this loop, although its data may have ended before."""
        self._decide()
        return self._last.pop(loop, None) is not None

    def answer(self, request: int) -> None:
        """Answer another worker's request; called by the watching thread."""
        with self._lock:
            self._write_answer(request, "")

    def _ask(self, loop: str) -> None:
        with self._lock:
            self._write_answer(self._decided + 1, loop)
        self.board.publish()

    def _write_answer(self, request: int, loop: str) -> None:
        if self._answered < request:
            key = f"syncbn/stop/{request}/{self.board.own.index}"
            self.board.write(key, f"{progress.batches} {loop}")
            self._answered = progress.asks = request

    def _decide(self) -> None:
        """Read every worker's answer to a request that this one has answered."""
        if self._answered == self._decided:
            return
        name = f"stopping after batch {progress.batches}"
        answers = [
            # A worker answers from one batch further on, and from its watching thread.
            self.board.wait(
                f"syncbn/stop/{self._answered}/{worker.index}", worker, name, here=False
            )
            for worker in self.board.workers
        ]
        last = max(int(answer.split()[0]) for answer in answers)
        for loop in {answer.partition(" ")[2] for answer in answers} - {""}:
            self._last[loop] = last
        self._decided = self._answered
