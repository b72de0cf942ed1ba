"""A mask and weights as one: how much each element counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import backend, ops

from syncbn.errors import InputError

__all__ = ["check_values", "element_weights"]


def element_weights(inputs: Any, axis: int, mask: Any | None, weights: Any | None) -> Any | None:
    """The weight of each element, of the rank of the inputs less one; None where all count 1.

    Args:
        inputs: floating point, any rank.
        axis: that of the channels.
        mask: any dtype, True where an element counts; the inputs' rank less one.
        weights: of any number type; the inputs' rank less one, or a number for each example, or
            one for all.

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
    elements = shape[:axis] + shape[axis + 1 :]
    if weights is not None:
        weights = ops.cast(_aligned(ops.convert_to_tensor(weights), elements, shape), dtype)
    if mask is None:
        return weights
    mask = ops.convert_to_tensor(mask)
    if len(mask.shape) != len(elements):
        raise InputError(
            "A mask requires one dimension less than the inputs: their shape without the channels' "
            f"axis. Received: mask.shape={tuple(mask.shape)}, inputs.shape={shape}, axis={axis}. "
            "Give one truth value for each position."
        )
    _check_sizes("mask", tuple(mask.shape), elements, shape)
    mask = ops.cast(mask, "bool")
    if weights is None:
        return ops.cast(mask, dtype)
    # Not a product: what is masked may be NaN.
    return ops.where(mask, weights, ops.zeros_like(weights))


def _aligned(weights: Any, elements: tuple[Any, ...], shape: tuple[Any, ...]) -> Any:
    """Weights of the rank of the elements."""
    own = tuple(weights.shape)
    if len(own) == 1 and len(elements) > 1:
        # As Keras reads sample_weight. By the rules of broadcasting it would be the last axis.
        own = own + (1,) * (len(elements) - 1)
        weights = ops.reshape(weights, (-1, *own[1:]))
    elif not own:
        own = (1,) * len(elements)
        weights = ops.reshape(weights, own)
    if len(own) != len(elements):
        raise InputError(
            "Weights require the inputs' shape without the channels' axis, with 1 for a size that "
            "is to be broadcast, or one weight for each example. Received: "
            f"weights.shape={own}, inputs.shape={shape}. Reshape the weights."
        )
    _check_sizes("weights", own, elements, shape)
    return weights


def _check_sizes(
    name: str, own: tuple[Any, ...], elements: tuple[Any, ...], shape: tuple[Any, ...]
) -> None:
    for size, wanted in zip(own, elements, strict=True):
        if size != wanted and size != 1 and size is not None and wanted is not None:
            raise InputError(
                f"{name} requires sizes of 1 or of the inputs without their channels, {elements}. "
                f"Received: {name}.shape={own}, inputs.shape={shape}. A {name} of one dimension "
                "is for examples; give others the rank of the inputs less one."
            )


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
