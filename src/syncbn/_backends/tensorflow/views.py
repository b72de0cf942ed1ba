"""The inputs as the kernels want them: (rows, 1, fold, channels), whatever their rank and axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

__all__ = ["View", "channels_last"]

# Elements that one float32 sum may run over. On [16, 56, 56, 64] this is a fold of 7: the gradient
# of gamma within 1.8e-6, forward and backward 5 % slower than unfolded (3.5e-6).
_ELEMENTS_A_SUM = 7168

# Examples to expect where their number is not known while the graph is made.
_LIKELY_EXAMPLES = 16

# Sums that a kernel runs side by side at no cost: with few channels, more of them for each. Not a
# power of two: rows of 8 · 64 numbers collide in the cache, 10 % slower than rows of 7 · 64.
_FREE_SUMS = 448


class View(NamedTuple):
    """Functions from the shape of the inputs to (rows, 1, fold, channels) and back."""

    of_tensor: Callable[[Any], Any]
    to_tensor: Callable[[Any], Any]
    of_weights: Callable[[Any], Any]  # of a size of 1 on any axis; on the channels' it stays 1

    @classmethod
    def of(cls, inputs: Any, axis: int, channels: int) -> View:
        """For tensors of the shape of these inputs.

        Channels that are not last are transposed: on a CPU the fused kernels take 5.9 ms for
        [16, 64, 56, 56] as it lies, 3.1 ms with the transposition.
        """
        rank = inputs.shape.rank
        axis %= rank
        shape = _believable_shape(inputs, axis, channels)
        to_last, from_last = channels_last(rank, axis)
        last_shape = [shape[position] for position in to_last]
        view_shape = (-1, 1, _fold(last_shape[:-1], channels), channels)

        def of_weights(weights: Any) -> Any:
            width = 1 if weights.shape[axis] == 1 else channels
            weights = weights if axis == rank - 1 else tf.transpose(weights, to_last)
            elements = tf.broadcast_to(weights, [*last_shape[:-1], width])
            return tf.reshape(elements, (*view_shape[:-1], width))

        if axis == rank - 1:
            return cls(
                lambda tensor: tf.reshape(tensor, view_shape),
                lambda view: tf.reshape(view, shape),
                of_weights,
            )
        return cls(
            lambda tensor: tf.reshape(tf.transpose(tensor, to_last), view_shape),
            lambda view: tf.transpose(tf.reshape(view, last_shape), from_last),
            of_weights,
        )


def channels_last(rank: int, axis: int) -> tuple[list[int], list[int]]:
    """The transposition that brings an axis to the end, and the one that brings it back."""
    to_last = [*range(axis), *range(axis + 1, rank), axis]
    return to_last, [*range(axis), rank - 1, *range(axis, rank - 1)]


def _fold(sizes: list[Any], channels: int) -> Any:
    """Over how many running sums to spread a channel: see `fused`.

    They must divide the elements, which of sizes that are unknown only the sizes themselves do, and
    of a number of examples its power of two.
    """
    if not sizes:
        return 1
    examples, *spatial = sizes
    if not all(isinstance(size, int) for size in spatial):
        return tf.maximum(spatial[-1], 1)
    elements = math.prod(spatial)
    if isinstance(examples, int):
        return _divisor(examples * elements, channels)
    fold = _divisor(elements * _LIKELY_EXAMPLES, channels, elements)
    if elements < _LIKELY_EXAMPLES:
        # Dense layers: batches that large are rare, and what follows costs small ones a tenth.
        return fold
    wanted = examples * (elements // fold) // _ELEMENTS_A_SUM
    # The power of two above what is wanted, as far as the number of examples has it as a divisor.
    powers = [tf.cast(wanted >= 2**power, examples.dtype) for power in range(8)]
    largest = tf.bitwise.left_shift(tf.ones_like(examples), tf.add_n(powers))
    return fold * tf.maximum(tf.minimum(largest, tf.bitwise.bitwise_and(examples, -examples)), 1)


def _divisor(elements: int, channels: int, divided: int | None = None) -> int:
    """The least fold of so many elements that divides them, or what else is to be divided."""
    if elements <= _ELEMENTS_A_SUM:
        return 1
    divided = divided or elements
    least = max(-(-elements // _ELEMENTS_A_SUM), _FREE_SUMS // channels)
    # Of a prime number of elements there is none.
    candidates = range(least, min(16 * least, divided) + 1)
    return next((k for k in candidates if divided % k == 0), 1)


def _believable_shape(inputs: Any, axis: int, channels: int) -> list[Any]:
    """Sizes by what is known when tracing, and by the tensor itself only where that is unknown.

    A convolution by oneDNN returns an empty batch in the shape of its own input, (0, 6, 6, 2) for
    what was declared (None, 4, 4, 4), and the fused kernels look at the last size.
    """
    known = list(inputs.shape)
    known[axis] = channels
    if None not in known:
        return known
    sizes = tf.shape(inputs)
    return [sizes[i] if size is None else size for i, size in enumerate(known)]
