"""A thread that tells the others what this process does, and looks at them when it gets stuck."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time

import tensorflow as tf
from tensorflow.python.eager import context as tf_context

from syncbn.errors import WorkerError
from syncbn.multi_worker.board import Board, Worker, timeout
from syncbn.multi_worker.collective_calls import is_in_collective, line_in
from syncbn.multi_worker.progress import progress
from syncbn.multi_worker.stopping import Stops

__all__ = ["Watch", "current", "start"]

PERIOD = 0.5  # seconds between two publications
PATIENCE = 1.0  # seconds in one phase before it looks at the others


class Watch:
    """Publishes this process's progress; when stuck, looks whether anyone can still come.

    Collectives wait for their timeout even where it is known that a worker is dead, or has left the
    operation by an error. This thread aborts them then, so that nobody waits in vain, and keeps
    the reason in `verdict`.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self.verdict: str | None = None
        self.stops = Stops(board)
        self._ended = threading.Event()
        self._process = os.getpid()
        self._place: tuple[int, ...] = ()
        self._since = time.monotonic()
        self._suspects: set[int] = set()
        self._away: dict[int, float] = {}  # since when a peer was seen in no collective
        self._thread = threading.Thread(target=self._run, name="syncbn-watch", daemon=True)

    def start(self) -> None:
        """From now on until the process ends."""
        self._thread.start()
        # A thread in TensorFlow's code while the interpreter is taken down would crash it.
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the thread, wait for its end, and leave the others."""
        if os.getpid() != self._process:
            return  # a forked child: the thread and TensorFlow's are its parent's
        self._ended.set()
        self._thread.join(timeout=10)
        self.board.leave()

    def stuck_for(self) -> float:
        """Seconds that this process has been waiting within one call, as far as was noticed."""
        return time.monotonic() - self._since

    def _run(self) -> None:
        try:
            while not self._ended.wait(PERIOD):
                self._turn()
        except (WorkerError, tf.errors.OpError) as error:
            # The board is lost, and with it whatever could be watched: at the end of a program
            # that is nobody's loss.
            if (progress.depth or progress.in_collective) and not self._ended.is_set():
                self._abort(str(error))

    def _turn(self) -> None:
        place = progress.place()
        if place != self._place:
            self._place, self._since = place, time.monotonic()
            self._suspects.clear()
            self._away.clear()
        self._look_at_own_loop()
        self.board.publish()
        watched = progress.depth or progress.is_creating or progress.in_collective
        if watched and self.verdict is None and self.stuck_for() >= PATIENCE:
            for peer in self.board.peers:
                self._look_at(peer)
            if progress.is_waiting() and self.stuck_for() >= timeout():
                self._abort(self._late())
            elif progress.in_collective and self.stuck_for() >= timeout():
                self._abort_if_others_are_away()
            # Many workers that all look at all others would keep the chief busy.
            self._ended.wait(len(self.board.peers) / 32)

    def _look_at_own_loop(self) -> None:
        """What a custom loop does: it advances no phase, and its stack is all that is known."""
        custom = progress.is_custom()
        frame = progress.frame() if custom else None
        progress.in_collective = custom and is_in_collective(frame)
        progress.line = line_in(frame) if custom else None

    def _abort_if_others_are_away(self) -> None:
        """Where this process waits in a collective, and a peer was in none for the timeout.

        Being long in a call with collectives is no sign by itself: a loop over a whole epoch may be
        one call. A peer that is in such a call, too, is taken to be in the same.
        """
        now = time.monotonic()
        away = [
            peer for peer in self.board.peers if now - self._away.get(peer.index, now) >= timeout()
        ]
        if away:
            words = [f"{peer} is late, last seen {self.board.last_seen(peer)}" for peer in away]
            self._abort(f"{'; '.join(words)}, in no collective for {timeout():g} s")

    def _look_at(self, peer: Worker) -> None:
        record = self.board.look_at(peer)
        if record is None or record["in_collective"]:
            self._away.pop(peer.index, None)
        else:
            self._away.setdefault(peer.index, time.monotonic())
        if record and record["asks"] > progress.asks:
            self.stops.answer(record["asks"])
        if record and record["failed"] and record["failed"][0] == progress.operation:
            self._abort(f"{peer} ended this operation by {record['failed'][1]}")
        elif record and record["has_left"]:
            self._abort(f"{peer} has ended its program")
        elif self.board.is_alive(peer):
            self._suspects.discard(peer.index)
        elif peer.index in self._suspects:  # twice in a row
            last_seen = self.board.last_seen(peer)
            self._abort(f"{peer} is gone: its server does not answer; last seen {last_seen}")
        else:
            self._suspects.add(peer.index)

    def _late(self) -> str:
        """Who is behind; where nobody is, what everybody does."""
        records = {peer: self.board.look_at(peer) for peer in self.board.peers}
        behind = [peer for peer, seen in records.items() if seen and seen["phase"] < progress.phase]
        words = [
            f"{peer} is {'late' if peer in behind else 'alive'}, "
            f"last seen {self.board.last_seen(peer)}"
            for peer in behind or self.board.peers
        ]
        return f"{'; '.join(words)}, after {timeout():.0f} s"

    def _abort(self, verdict: str) -> None:
        if self.verdict is None:
            self.verdict = verdict
            tf_context.context().abort_collective_ops(tf.errors.UNAVAILABLE, verdict)


_watch: Watch | None = None


def start(board: Board) -> None:
    """Begin to watch; once a process."""
    global _watch
    if _watch is None:
        _watch = Watch(board)
        _watch.start()
        os.register_at_fork(after_in_child=end_by_sigterm)


def end_by_sigterm() -> None:
    """In a forked child, as a pool's, which is ended so and then waited for.

    In a worker TensorFlow catches SIGTERM, to tell the cluster of it. A child inherits that, but
    not the threads that would do it, and lives on: `PyDataset(use_multiprocessing=True)` never
    ended.
    """
    # Python knows of none but its own handlers.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def current() -> Watch | None:
    """This process's, if it has other workers."""
    return _watch
