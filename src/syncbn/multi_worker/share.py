"""One replica's share of the global batch, known to the code that a step runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from keras.src import tree
from keras.src.trainers.data_adapters.data_adapter_utils import unpack_x_y_sample_weight

from syncbn.multi_worker.replicas import replica_count, sum_over_replicas

__all__ = ["Share", "current_share", "fraction_of_batch", "sharing"]

Path = tuple[Any, ...]

# One stack a thread: a strategy runs its replicas in threads of their own.
_shares = threading.local()


class Share:
    """How many examples this replica has of the batch, and all of them together.

    `examples`: a float32 scalar. It also remembers which tensors are results of metrics.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples
        # By identity, which is one only as long as the object lives: the tensor is kept, too.
        self._results: dict[int, tuple[Any, Any, Path]] = {}
        self._all: Any = None

    def note_result(self, metric: Any, result: Any) -> None:
        """What a metric has returned: one tensor, or several by their names."""
        for path, tensor in tree.flatten_with_path(result):
            self._results[id(tensor)] = tensor, metric, tuple(path)

    def result_of(self, tensor: Any) -> tuple[Any, Path] | None:
        """Whose result it is, and where it is in that, if it is one as it was returned."""
        found = self._results.get(id(tensor))
        return found and found[1:]

    def all_examples(self) -> Any:
        """Of every replica. The first call is a collective, if `learn` has not come before."""
        if self._all is None:
            self._all = sum_over_replicas(self.examples)
        return self._all

    def learn(self, all_examples: Any) -> None:
        """Take the sum from a collective that has carried it along."""
        if self._all is None:
            self._all = all_examples

    def as_mean(self, part: Any) -> Any:
        """A value whose mean over all examples is the sum over the replicas of their parts.

        Keras weighs the loss of a step by the replica's examples when it tracks it. An empty
        replica's part is 0, so that nothing is lost there, and no collective is needed.
        """
        scale = tf.math.divide_no_nan(self.all_examples(), self.examples)
        return part * tf.cast(scale, part.dtype)

    def fraction(self) -> Any:
        """This replica's part of the batch: 0 where it is empty."""
        return tf.math.divide_no_nan(self.examples, self.all_examples())


@contextlib.contextmanager
def sharing(data: Any) -> Iterator[Share]:
    """For the step that is run on this replica's part of the data."""
    x, _, _ = unpack_x_y_sample_weight(data)
    first = next((leaf for leaf in tree.flatten(x) if leaf is not None), None)
    share = Share(_examples_of(first))
    stack = _stack()
    stack.append(share)
    try:
        yield share
    finally:
        stack.pop()


def _examples_of(batch: Any) -> Any:
    """How many examples it has, known only once it is there.

    Of a batch of static shape the number is a constant, and its sum over the workers would be under
    way while the dataset finds that it is at its end. That error cancels the sum, which at the
    other worker is no end of data but an error of the collective, and aborts all of them.
    """
    if batch is None:
        return tf.constant(1.0)
    examples = tf.cast(tf.shape(batch)[0], tf.float32)
    if tf.executing_eagerly():
        return examples
    with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)[:1]):
        return tf.identity(examples)


def current_share() -> Share | None:
    """That of the innermost step, or none: in a training loop that the user has written."""
    return _stack()[-1] if _stack() else None


def fraction_of_batch() -> Any:
    """This replica's part of the batch: without a step that tells, all count the same."""
    share = current_share()
    return 1.0 / replica_count() if share is None else share.fraction()


def _stack() -> list[Share]:
    if not hasattr(_shares, "stack"):
        _shares.stack = []
    stack: list[Share] = _shares.stack
    return stack
