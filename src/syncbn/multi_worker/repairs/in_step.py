"""What one worker does alone, and cannot: an error at once, or an agreement.

A callback of the chief that evaluates, predicts or reads a metric enters collectives that the
others never join: it waits, or takes part in those of their next training step. A worker that
stops, or that has fewer batches than the others, leaves them waiting.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.callbacks.callback_list import CallbackList
from tensorflow.python.distribute.values import SyncOnReadVariable

from syncbn.errors import WorkerError
from syncbn.multi_worker import watch
from syncbn.multi_worker.board import Board, board_of
from syncbn.multi_worker.operations import OPERATIONS
from syncbn.multi_worker.progress import callback_in, progress
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.rings import numbers

__all__ = ["is_needed", "patches"]

# The moments at which callbacks run: what they are called, and what stops the loop of batches.
HOOKS = {
    "on_train_begin": "the beginning of training",
    "on_train_end": "the end of training",
    "on_epoch_begin": "the beginning of epoch",
    "on_epoch_end": "the end of epoch",
    "on_train_batch_begin": "training step",
    "on_train_batch_end": "the end of training step",
    "on_test_begin": "the beginning of evaluation",
    "on_test_end": "the end of evaluation",
    "on_test_batch_begin": "evaluation step",
    "on_test_batch_end": "the end of evaluation step",
    "on_predict_begin": "the beginning of prediction",
    "on_predict_end": "the end of prediction",
    "on_predict_batch_begin": "prediction step",
    "on_predict_batch_end": "the end of prediction step",
}
STOPS = {
    "on_train_batch_end": "stop_training",
    "on_test_batch_end": "stop_evaluating",
    "on_predict_batch_end": "stop_predicting",
}
# The arguments that say how often an operation meets the other workers.
LENGTHS = ("epochs", "initial_epoch", "steps_per_epoch", "validation_steps", "steps")
# The moment after each loop of batches.
LOOPS = {
    "on_epoch_end": "on_train_batch_end",
    "on_test_end": "on_test_batch_end",
    "on_predict_end": "on_predict_batch_end",
}


def is_needed() -> bool:
    """Whether a worker leaves Keras's loop when it alone was asked to."""
    return source_probe(
        "keras.src.backend.tensorflow.trainer.TensorFlowTrainer.fit",
        broken="callbacks.on_train_batch_end(end_step, logs) if self.stop_training: break",
    )


def patches() -> list[Patch]:
    """The operations, the callbacks' moments, reads of summed variables."""
    return [
        *(Patch(TensorFlowTrainer, name, _together(name)) for name in OPERATIONS),
        *(Patch(CallbackList, hook, _moment(hook)) for hook in HOOKS),
        Patch(SyncOnReadVariable, "_get_cross_replica", _read_together),
    ]


def _meet(board: Board, name: str, value: Any = None) -> list[Any]:
    """Wait until every worker is at this place."""
    found = callback_in(sys._getframe()) if progress.in_callback else None
    return board.exchange(f"{name}, called in a callback" if found else name, value)


def _begin(board: Board, name: str, arguments: Mapping[str, Any]) -> None:
    """Meet at the entry of an operation, and see that it is equally long everywhere.

    The numbers of collectives are seen to be the same, too, after whatever happened before.

    Raises:
        WorkerError: a worker is elsewhere, or was given other numbers.
    """
    own = {key: arguments[key] for key in LENGTHS if isinstance(arguments.get(key), int)}
    answers = _meet(board, f"{name}()", {"lengths": own, "numbers": numbers.state()})
    for worker, answer in zip(board.workers, answers, strict=True):
        if answer["lengths"] != own:
            raise WorkerError(
                f"{name}() requires the same numbers of steps and epochs on every worker. "
                f"Received: {own} on {board.own}, {answer['lengths']} on {worker}."
            )
    numbers.agree([answer["numbers"] for answer in answers])


def _together(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def operation(model: Any, *args: Any, **kwargs: Any) -> Any:
            board = board_of(model.distribute_strategy)
            if board is None:
                return original(model, *args, **kwargs)
            try:
                # Within an operation only what a callback calls can be on one worker alone.
                if progress.depth == 0 or progress.in_callback:
                    _begin(board, name, signature.bind(model, *args, **kwargs).arguments)
                with progress.inside(name), numbers.operation():
                    return original(model, *args, **kwargs)
            except BaseException:
                if progress.failed is not None:
                    with contextlib.suppress(WorkerError):  # the board went with the chief
                        board.publish()  # at once: this process may be about to end
                raise

        return operation

    return replacement


def _moment(hook: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    words = HOOKS[hook]

    def replacement(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def moment(callbacks: Any, *args: Any, **kwargs: Any) -> None:
            watching = watch.current()
            if watching is None or not progress.depth:
                return original(callbacks, *args, **kwargs)
            number = args[0] if args and isinstance(args[0], int) else None
            if hook == "on_epoch_begin":
                progress.epoch = number
            with progress.callbacks(hook, words, number):
                original(callbacks, *args, **kwargs)
            if callbacks._model is not None:
                _agree_on_stopping(watching, callbacks._model, hook, number)
            return None

        return moment

    return replacement


def _agree_on_stopping(watching: watch.Watch, model: Any, hook: str, number: int | None) -> None:
    if hook in STOPS:
        asked = bool(getattr(model, STOPS[hook], False))
        setattr(model, STOPS[hook], watching.stops.after_batch(hook, asked))
    elif hook in LOOPS:
        asked = watching.stops.after_loop(LOOPS[hook])
        if hook == "on_epoch_end":
            name = f"the end of epoch {(number or 0) + 1}"
            wants = watching.board.exchange(name, asked or bool(model.stop_training))
            model.stop_training = any(wants)


def _read_together(original: Callable[..., Any]) -> Callable[..., Any]:
    """A read, outside the replicas, of a variable whose value is the sum over the workers."""

    @functools.wraps(original)
    def _get_cross_replica(variable: Any) -> Any:
        summed = variable._aggregation in {
            tf.VariableAggregation.SUM,
            tf.VariableAggregation.MEAN,
        }
        if progress.in_callback and summed and tf.executing_eagerly():
            board = board_of(variable._distribute_strategy)
            if board is not None:
                _meet(board, f"reading {variable.name}")
        return original(variable)

    return _get_cross_replica
