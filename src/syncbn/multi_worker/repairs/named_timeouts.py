"""No collective waits for ever, and the error of one names the worker that it waited for.

TensorFlow sets no timeout unless asked to, and its errors tell a device and a number. What it does
when asked to starts a thread for every collective, which sleeps as long: with 40 of them a step
there are soon more than a machine can have. Here the one thread that watches keeps the time.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from tensorflow.python.distribute import multi_worker_util
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended
from tensorflow.python.eager import context as tf_context
from tensorflow.python.ops import collective_ops

from syncbn.errors import WorkerError
from syncbn.multi_worker import watch
from syncbn.multi_worker.board import Board, Worker, board_of, timeout, workers_of
from syncbn.multi_worker.meeting import meet
from syncbn.multi_worker.operations import OPERATIONS
from syncbn.multi_worker.progress import progress
from syncbn.multi_worker.repair import Patch, source_probe

__all__ = ["is_needed", "patches"]

ERRORS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)
# What TensorFlow writes where it speaks of workers and not, say, of a file server.
SPEAKS_OF_WORKERS = ("ollective", "RecvBuf", "oordination", "Aborted by", "_Recv")


def is_needed() -> bool:
    """Whether TensorFlow broadcasts a new variable without a timeout."""
    return source_probe(
        "tensorflow.python.distribute.collective_all_reduce_strategy."
        "CollectiveAllReduceExtended._get_variable_creator_initial_value",
        broken="initial_value.dtype, group_size, group_key, collective_instance_key, )",
        mended="timeout",
    )


def patches() -> list[Patch]:
    """The start of a strategy, the broadcasts of new variables, the operations of the trainer."""
    return [
        Patch(CollectiveAllReduceExtended, "_initialize_multi_worker", _meeting),
        Patch(collective_ops, "broadcast_send", _watched),
        Patch(collective_ops, "broadcast_recv", _watched),
        *(Patch(TensorFlowTrainer, name, _naming(name)) for name in OPERATIONS),
    ]


def _meeting(original: Callable[..., Any]) -> Callable[..., Any]:
    """All workers meet before TensorFlow's server waits for them, for an hour and deaf."""

    @functools.wraps(original)
    def _initialize_multi_worker(extended: Any, cluster_resolver: Any) -> None:
        context = tf_context.context()
        # Only the first strategy of a process starts a server; too late, it says so itself.
        if not context._initialized and tf.executing_eagerly():
            spec = multi_worker_util.normalize_cluster_spec(cluster_resolver.cluster_spec())
            kind, task = cluster_resolver.task_type, cluster_resolver.task_id
            workers = workers_of(spec)
            own = [w.index for w in workers if (w.job, w.task) == (kind, task)]
            if own and len(workers) > 1:
                meet([worker.address for worker in workers], own[0], timeout())
        original(extended, cluster_resolver)

    return _initialize_multi_worker


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    """A new variable: outside of any operation the watching thread looks at it, too."""

    @functools.wraps(original)
    def broadcast(*args: Any, **kwargs: Any) -> Any:
        board = board_of(tf.distribute.get_strategy())
        if board is None:
            return original(*args, **kwargs)
        with progress.creating():
            return original(*args, **kwargs)

    return broadcast


def _naming(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def operation(model: Any, *args: Any, **kwargs: Any) -> Any:
            board = board_of(model.distribute_strategy)
            if board is None:
                return original(model, *args, **kwargs)
            begun = time.monotonic()
            try:
                return original(model, *args, **kwargs)
            except ERRORS as error:
                if not any(words in str(error) for words in SPEAKS_OF_WORKERS):
                    raise
                raise _named(board, name, begun) from error

        return operation

    return replacement


def _named(board: Board, name: str, begun: float) -> WorkerError:
    """The error with the workers that were waited for, and what each of them does."""
    watching = watch.current()
    here = progress.words()
    waited = min(watching.stuck_for() if watching else time.monotonic(), time.monotonic() - begun)
    if watching and watching.verdict:
        found = [watching.verdict]
    else:
        # The connection to a worker that has ended may break before the thread looks at it.
        found = [_fate(board, worker) for worker in board.peers]
    error: WorkerError = WorkerError(
        f"{name}() requires all {len(board.workers)} workers at the same step. "
        f"Received: {'; '.join(found)}. This is {board.own}, which waited {waited:.1f} s at "
        f"{here}. TensorFlow's collectives stay aborted in this process: restart all workers; "
        "keras.callbacks.BackupAndRestore resumes where they were. Where a worker is only slow, "
        "give enable_multi_worker(timeout=…) more seconds."
    )
    return error


def _fate(board: Board, worker: Worker) -> str:
    with contextlib.suppress(WorkerError):  # the board went with the chief
        record = board.look_at(worker)
        if record and record["failed"] and record["failed"][0] == progress.operation:
            return f"{worker} ended this operation by {record['failed'][1]}"
    return f"{worker} is {_state(board, worker)}"


def _state(board: Board, worker: Worker) -> str:
    state = "alive" if board.is_alive(worker) else "gone (its server does not answer)"
    try:
        return f"{state}, last seen {board.last_seen(worker)}"
    except WorkerError:  # the board went with the chief
        return f"{state}, and what it did last cannot be read"
