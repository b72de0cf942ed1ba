"""No collective waits for ever, and the error of one names the worker that it waited for.

TensorFlow sets no timeout unless asked to, none at all for the broadcast of a new variable, and its
errors tell a device and a number. What a worker does otherwise is known from its progress.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from tensorflow.python.distribute import collective_util
from tensorflow.python.distribute.cross_device_utils import CollectiveReplicaLauncher
from tensorflow.python.ops import collective_ops

from syncbn.errors import WorkerError
from syncbn.multi_worker import watch
from syncbn.multi_worker.board import Board, Worker, board_of, timeout
from syncbn.multi_worker.progress import progress
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import is_multi_worker

__all__ = ["OPERATIONS", "is_needed", "patches"]

OPERATIONS = (
    "fit",
    "evaluate",
    "predict",
    "train_on_batch",
    "test_on_batch",
    "predict_on_batch",
)
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
    """Both launchers of collectives, the broadcasts, and the operations of the trainer."""
    return [
        Patch(CollectiveReplicaLauncher, "all_reduce", _all_reduce_with_timeout),
        Patch(CollectiveReplicaLauncher, "_all_gather", _all_gather_with_timeout),
        Patch(collective_ops, "broadcast_send", _broadcast_with_timeout),
        Patch(collective_ops, "broadcast_recv", _broadcast_with_timeout),
        *(Patch(TensorFlowTrainer, name, _naming(name)) for name in OPERATIONS),
    ]


def _options(launcher: Any, options: Any) -> Any:
    """The options of this call, of the strategy, or our timeout, whichever says one first."""
    merged = launcher._options.merge(options)
    # Replicas of one process cannot be late, and watching the clock costs each collective time.
    if merged.timeout_seconds or not is_multi_worker(tf.distribute.get_strategy()):
        return options
    ours = collective_util.Options(timeout_seconds=timeout())
    return ours if options is None else options.merge(ours)


def _all_reduce_with_timeout(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_reduce(
        launcher: Any, input_tensor: Any, control_input: Any = None, options: Any = None
    ) -> Any:
        return original(launcher, input_tensor, control_input, _options(launcher, options))

    return all_reduce


def _all_gather_with_timeout(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _all_gather(launcher: Any, input_tensor: Any, options: Any) -> Any:
        return original(launcher, input_tensor, _options(launcher, options))

    return _all_gather


def _broadcast_with_timeout(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def broadcast(*args: Any, timeout: float = 0, **kwargs: Any) -> Any:
        return original(*args, timeout=timeout or _timeout(), **kwargs)

    return broadcast


def _timeout() -> float:
    return timeout()


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
        found = [f"{worker} is {_state(board, worker)}" for worker in board.peers]
    error: WorkerError = WorkerError(
        f"{name}() requires all {len(board.workers)} workers at the same step. "
        f"Received: {'; '.join(found)}. This is {board.own}, which waited {waited:.1f} s at "
        f"{here}. TensorFlow's collectives stay aborted in this process: restart all workers; "
        "keras.callbacks.BackupAndRestore resumes where they were. Where a worker is only slow, "
        "give enable_multi_worker(timeout=…) more seconds."
    )
    return error


def _state(board: Board, worker: Worker) -> str:
    state = "alive" if board.is_alive(worker) else "gone (its server does not answer)"
    try:
        return f"{state}, last seen {board.last_seen(worker)}"
    except WorkerError:  # the board went with the chief
        return f"{state}, and what it did last cannot be read"
