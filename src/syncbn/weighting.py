"""A mask and weights as one: how much each element counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import backend, ops

from syncbn.errors import InputError

__all__ = ["check_values", "element_weights"]


def element_weights(inputs: Any, axis: int, mask: Any | None, weights: Any | None) -> Any | None:
    """The weight of each element, of the rank of the inputs; None where all count 1.

    Args:
        inputs: floating point, any rank.
        axis: that of the channels.
        mask: any dtype, True where an element counts; as Keras hands it on, the shape of the inputs
            without their last axis, whatever the axis of the channels.
        weights: of any number type; the shape of the inputs without the axis of the channels, or a
            number for each example, or one for all.

    Returns:
        Weights in float64 for float64 inputs, else in float32; each axis of its size or 1.

    Raises:
        InputError: a rank or a size that does not fit.
    """
    if mask is None and weights is None:
        return None
    dtype = "float64" if backend.standardize_dtype(inputs.dtype) == "float64" else "float32"
    shape = tuple(inputs.shape)
    axis %= len(shape)
    if weights is not None:
        weights = _aligned(ops.convert_to_tensor(weights), shape[:axis] + shape[axis + 1 :], shape)
        weights = ops.expand_dims(ops.cast(weights, dtype), axis)
    if mask is None:
        return weights
    mask = ops.expand_dims(ops.cast(_checked_mask(ops.convert_to_tensor(mask), shape), "bool"), -1)
    if weights is None:
        return ops.cast(mask, dtype)
    # Not a product: what is masked may be NaN.
    return ops.where(mask, weights, ops.zeros_like(weights))


def _checked_mask(mask: Any, shape: tuple[Any, ...]) -> Any:
    own = tuple(mask.shape)
    if len(own) != len(shape) - 1 or not _fits(own, shape[:-1]):
        raise InputError(
            "A mask requires the inputs' shape without their last axis, as Keras hands it on; "
            f"sizes of 1 are broadcast. Received: mask.shape={own}, inputs.shape={shape}. Give "
            "one truth value for each position; where the channels are not last, `weights` takes "
            "zeros and ones of the inputs' shape without the axis of the channels."
        )
    return mask


def _aligned(weights: Any, elements: tuple[Any, ...], shape: tuple[Any, ...]) -> Any:
    """Weights of the rank of the elements."""
    own = tuple(weights.shape)
    if not own:
        return ops.reshape(weights, (1,) * len(elements))
    # As Keras reads sample_weight. By the rules of broadcasting it would be the last axis.
    padded = own + (1,) * (len(elements) - 1) if len(own) == 1 else own
    if len(padded) != len(elements) or not _fits(padded, elements):
        raise InputError(
            "Weights require the inputs' shape without the axis of the channels, with 1 for a size "
            "that is to be broadcast, or one weight for each example, or one for all. Received: "
            f"weights.shape={own}, inputs.shape={shape}, so that the first would be {elements}. "
            "Reshape the weights."
        )
    return weights if len(padded) == len(own) else ops.reshape(weights, (-1, *padded[1:]))


def _fits(own: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Whether each size is the wanted one, or 1, or either is not known yet."""
    pairs = zip(own, wanted, strict=True)
    return all(size in (1, want, None) or want is None for size, want in pairs)


def check_values(weights: np.ndarray, layer: str) -> None:
    """Make sure that weights whose values are known are weights.

    Raises:
        InputError: one is negative, infinite or NaN.
    """
    wrong = weights[~(np.isfinite(weights) & (weights >= 0))]
    if wrong.size:
        raise InputError(
            f"Layer {layer!r} requires finite weights of at least 0. Received: {wrong.size} of "
            f"{weights.size} that are not, the first {wrong.flat[0]}. Leave an element out by "
            "weight 0 or a mask."
        )
