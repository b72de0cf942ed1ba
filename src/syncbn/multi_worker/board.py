"""A board on which the workers of a cluster write: TensorFlow's coordination service.

It holds keys and values at the chief, beside the collectives: whoever waits on the board can look
what the others do, and it works on after the collectives were aborted.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute import multi_worker_util
from tensorflow.python.eager import context as tf_context

from syncbn.errors import WorkerError
from syncbn.multi_worker import switch
from syncbn.multi_worker.progress import progress
from syncbn.multi_worker.replicas import is_multi_worker, worker_index

__all__ = ["Board", "Worker", "agree", "board_of", "exchange", "workers_of"]

LEAVING = 10.0  # seconds that the chief waits at its end for the others to end
POLL = 0.2  # seconds between two looks at what a missing worker does
UNREACHABLE = (
    tf.errors.UnavailableError,
    tf.errors.FailedPreconditionError,  # it was restarted: another process at the same address
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)


@dataclass(frozen=True)
class Worker:
    """A process of the cluster, by its number, its place in TF_CONFIG and its address."""

    index: int
    job: str
    task: int
    address: str

    def __str__(self) -> str:
        return f"worker {self.index} ({self.address})"


def timeout() -> float:
    """Seconds that one worker waits for another."""
    enabled = switch.active()
    return enabled.timeout if enabled is not None else switch.default_timeout()


class Board:
    """One a process. Its keys are numbered, and all workers advance the numbers alike."""

    def __init__(self, workers: list[Worker], index: int) -> None:
        self.workers = workers
        self.own = workers[index]
        self.peers = [worker for worker in workers if worker.index != index]
        self.seen: dict[int, dict[str, Any]] = {}
        self._number = 0
        self._elsewhere = False
        self._used: list[str] = []
        self._lock = threading.Lock()
        self._published: dict[str, Any] = {}

    def exchange(self, name: str, value: Any) -> list[Any]:
        """Every worker's JSON value, in the order of the workers; each must call it.

        Raises:
            WorkerError: a worker is gone, late, has gone past this place or is in another one.
        """
        key = self._post(name, value)
        number = self._number
        try:
            answers = [
                value if worker is self.own else self._wait_for(worker, name)
                for worker in self.workers
            ]
        except BaseException:
            self._uncount()
            if self._number < number:
                with contextlib.suppress(WorkerError):
                    self.remove(key)
            raise
        # Everyone has come here, so that everyone has read what was written before.
        for old in self._used[:-1]:
            self.remove(old)
        del self._used[:-1]
        return answers

    def agree(self, name: str, value: Any) -> Any:
        """The chief's JSON value; each worker must call it, and the chief does not wait.

        Raises:
            WorkerError: as `exchange`.
        """
        if self.own.index == 0:
            self._post(name, value)
            return value
        self._number += 1
        try:
            return self._wait_for(self.workers[0], name)
        except BaseException:
            self._uncount()
            raise

    def _uncount(self) -> None:
        """Take the number back, unless the others meet this worker under it and raise as well."""
        if not self._elsewhere:
            self._number -= 1
        self._elsewhere = False

    def _post(self, name: str, value: Any) -> str:
        self._number += 1
        key = f"syncbn/{self._number}/{self.own.index}"
        self.write(key, json.dumps([name, value]))
        self._used.append(key)
        return key

    def _wait_for(self, worker: Worker, name: str) -> Any:
        key = f"syncbn/{self._number}/{worker.index}"
        text = self.wait(key, worker, name)
        theirs, value = json.loads(text)
        if theirs != name:
            found = f"another is at {theirs}"
            self._elsewhere = True
            raise self.apart(worker, name, found, seen=False)
        return value

    def wait(self, key: str, worker: Worker, name: str, *, here: bool = True) -> str:
        """What that worker writes under the key; `here`: before it goes past this place.

        Raises:
            WorkerError: it is gone, has failed, has gone past this place, or is late.
        """
        begun = time.monotonic()
        text = self.read(key, POLL)
        while text is None:
            waited = time.monotonic() - begun
            if waited > timeout():
                raise self.apart(worker, name, f"it has not come in {waited:.0f} s")
            if not self.is_alive(worker):
                raise self.apart(worker, name, "it is gone: its server does not answer")
            theirs = self.look_at(worker)
            if theirs and theirs["failed"] and theirs["failed"][0] >= progress.current_operation():
                raise self.apart(worker, name, f"it ended by {theirs['failed'][1]}")
            # Looked at once more: it may have come, written the key and gone on meanwhile.
            text = self.read(key, POLL)
            if here and text is None and theirs and theirs["phase"] > progress.phase:
                self._elsewhere = True
                raise self.apart(worker, name, "it has gone past this place")
        return text

    def apart(self, worker: Worker, name: str, found: str, seen: bool = True) -> WorkerError:
        """The error that names both workers, what each is doing, and the remedy."""
        error: WorkerError = WorkerError(
            f"{name} requires all {len(self.workers)} workers: call it on every worker, in the "
            f"same order, not on the chief alone. Received: {found}: {worker}"
            f"{', last seen ' + self.last_seen(worker) if seen else ''}; this is {self.own}, "
            f"at {progress.words()}."
        )
        return error

    def last_seen(self, worker: Worker) -> str:
        """What that worker did when somebody looked, in words."""
        self.look_at(worker)
        record = self.seen.get(worker.index)
        return f"at {record['words']}" if record else "nowhere yet"

    def look_at(self, worker: Worker) -> dict[str, Any] | None:
        """What that worker has published, or had when it could be read."""
        text = self.read(f"syncbn/progress/{worker.index}", POLL)
        if text is not None:
            self.seen[worker.index] = json.loads(text)
        return self.seen.get(worker.index)

    def publish(self) -> None:
        """Let the others read what this process is doing, unless they already can."""
        record = progress.record()
        with self._lock:  # the thread publishes, and so does who has failed
            if record == self._published:
                return
            key = f"syncbn/progress/{self.own.index}"
            if self._published:
                self.remove(key)  # a key is set once
            self.write(key, json.dumps(record))
            self._published = record

    def is_alive(self, worker: Worker) -> bool:
        """Whether that worker's server answers, as the same process as before."""
        task = f"/job:{worker.job}/replica:0/task:{worker.task}"
        try:
            tf_context.context().check_collective_ops_peer_health(task, timeout_in_ms=2000)
        except UNREACHABLE:
            return False
        return True

    def write(self, key: str, text: str) -> None:
        """Put it on the board.

        Raises:
            WorkerError: the chief, which holds the board, is gone.
        """
        try:
            tf_context.context().set_config_key_value(key, text)
        except tf.errors.OpError as error:
            raise self.lost(error) from error

    def read(self, key: str, seconds: float) -> str | None:
        """What stands there, or None if nothing does so long.

        Raises:
            WorkerError: the chief, which holds the board, is gone.
        """
        try:
            return str(tf_context.context().get_config_key_value(key, max(1, int(seconds * 1000))))
        except (tf.errors.DeadlineExceededError, tf.errors.NotFoundError):
            return None
        except tf.errors.OpError as error:
            raise self.lost(error) from error

    def remove(self, key: str) -> None:
        """Take it off the board; what is no longer there does not matter."""
        try:
            tf_context.context().delete_config_key_value(key)
        except tf.errors.OpError as error:
            raise self.lost(error) from error

    def leave(self) -> None:
        """Say that this worker needs no other any more; the chief, which holds the board, waits.

        Others may still read the last that was written, or why the chief has failed. Where the
        chief is gone first TensorFlow takes up to half a minute to end them.
        """
        with contextlib.suppress(WorkerError):
            progress.has_left = True
            self.publish()
            if self.own.index > 0:
                self.write(f"syncbn/left/{self.own.index}", "left")
                return
            deadline = time.monotonic() + LEAVING
            for peer in self.peers:
                while self.read(f"syncbn/left/{peer.index}", POLL) is None:
                    if time.monotonic() > deadline or not self.is_alive(peer):
                        break
            time.sleep(POLL)  # the last of them is still being answered

    def lost(self, cause: Exception) -> WorkerError:
        """The error of a board that cannot be reached."""
        chief = self.workers[0]
        alive = self.is_alive(chief)
        state = "its server answers" if alive else "it is gone: its server does not answer"
        error: WorkerError = WorkerError(
            f"Coordinating {len(self.workers)} workers requires the coordination service of "
            f"{chief}. Received: {state}: {type(cause).__name__}: {str(cause)[:300]}. "
            f"This is {self.own}, "
            f"at {progress.words()}. Restart the workers."
        )
        return error


_boards: dict[tuple[Worker, ...], Board] = {}


def workers_of(spec: Any) -> list[Worker]:
    """Those of a ClusterSpec, in the order of their numbers."""
    workers = [
        Worker(multi_worker_util.id_in_cluster(spec, job, task), job, task, address)
        for job in ("chief", "worker")
        if job in spec.jobs
        for task, address in enumerate(spec.job_tasks(job))
    ]
    return sorted(workers, key=lambda worker: worker.index)


def board_of(strategy: Any) -> Board | None:
    """The board of this process, or None where the strategy has one worker.

    Raises:
        WorkerError: TensorFlow runs without a coordination service. There is no second way:
            collectives, the only other one, cannot be waited for and watched at a time.
    """
    if not is_multi_worker(strategy):
        return None
    workers = workers_of(strategy.extended._cluster_spec)
    if len(workers) < 2:
        return None
    if tuple(workers) not in _boards:
        if tf_context.context().coordination_service is None:
            raise WorkerError(
                f"Training on {len(workers)} workers requires TensorFlow's coordination service, "
                "which MultiWorkerMirroredStrategy starts. Received: none. Make the strategy "
                "before anything else of TensorFlow runs, in TensorFlow 2.16 or later."
            )
        from syncbn.multi_worker.watch import start

        board = Board(workers, worker_index(strategy))
        _boards[tuple(workers)] = board
        start(board)
    return _boards[tuple(workers)]


def agree(strategy: Any, name: str, value_of_the_chief: Any) -> Any:
    """The chief's JSON value on every worker; this worker's own where it is the only one.

    Raises:
        WorkerError: a worker is gone, late, or does something else; the error names it.
    """
    board = board_of(strategy)
    return value_of_the_chief if board is None else board.agree(name, value_of_the_chief)


def exchange(strategy: Any, name: str, value: Any) -> list[Any]:
    """Every worker's JSON value, in the order of the workers.

    Raises:
        WorkerError: a worker is gone, late, or does something else; the error names it.
    """
    board = board_of(strategy)
    return [value] if board is None else board.exchange(name, value)
