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
    """This worker's part of the agreement on the last batch."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._lock = threading.Lock()
        self._answered = 0  # how many requests this worker has answered
        self._decided = 0  # and of how many it knows the outcome
        self._last: int | None = None

    def forget(self) -> None:
        """A loop over batches has ended, be it at the last batch agreed on or before."""
        self._last = None

    def after_batch(self, asked: bool) -> bool:
        """Whether the loop ends after this batch; `asked`: whether this worker wants it to."""
        if asked and self._last is None:
            with self._lock:
                request = self._decided + 1
                self._write_answer(request)
                progress.asks = request
            self.board.publish()
        while True:
            if self._answered > self._decided:
                self._decide()
            with self._lock:
                if self._answered > self._decided:
                    continue  # the thread has answered a moment ago
                if self._last is not None and progress.batches >= self._last:
                    return True
                progress.batches += 1
                return False

    def answer(self, request: int) -> None:
        """Answer another worker's request; called by the watching thread."""
        with self._lock:
            self._write_answer(request)
            progress.asks = request

    def _write_answer(self, request: int) -> None:
        if self._answered < request:
            key = f"syncbn/stop/{request}/{self.board.own.index}"
            self.board.write(key, str(progress.batches))
            self._answered = request

    def _decide(self) -> None:
        request = self._decided + 1
        name = f"stopping after batch {progress.batches}"
        answers = [
            int(self.board.wait(f"syncbn/stop/{request}/{worker.index}", worker, name))
            for worker in self.board.workers
        ]
        self._last = max(answers)
        self._decided = request
