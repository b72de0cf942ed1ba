"""Layers that are linear in their kernel, so that a scale and a shift go into it and the bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np

__all__ = [
    "Affine",
    "affine_of",
    "bias_axes",
    "channel_axis",
    "folded_weights",
    "is_linear",
]

_LAST = ("Dense", "EinsumDense", "Conv1D", "Conv2D", "Conv3D")
_TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
_DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D")
_SEPARABLE = ("SeparableConv1D", "SeparableConv2D")


class Affine(NamedTuple):
    """y = (x − mean) · scale + beta, a channel each, in float64."""

    mean: np.ndarray
    scale: np.ndarray
    beta: np.ndarray


def affine_of(layer: Any) -> Affine:
    """What a batch normalization does in inference."""
    mean, variance = _float64(layer.moving_mean), _float64(layer.moving_variance)
    gamma = _float64(layer.gamma) if layer.scale else np.ones_like(mean)
    beta = _float64(layer.beta) if layer.center else np.zeros_like(mean)
    with np.errstate(all="ignore"):  # `folded_weights` refuses what is not finite
        return Affine(mean, gamma / np.sqrt(variance + layer.epsilon), beta)


def is_linear(layer: Any) -> bool:
    """Whether the layer is of one of the classes known here, and not of a subclass."""
    return type(layer) in _classes(_LAST + _TRANSPOSED + _DEPTHWISE + _SEPARABLE)


def channel_axis(layer: Any, rank: int) -> int | None:
    """The axis of the outputs along which the kernel scales; None where there is none."""
    if type(layer) is keras.layers.EinsumDense:
        return rank - 1 if _einsum_label(layer) is not None else None
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return 1 if first else rank - 1


def bias_axes(layer: Any) -> str | None:
    """The label of an EinsumDense's channels, which its new bias needs."""
    return _einsum_label(layer) if type(layer) is keras.layers.EinsumDense else None


def folded_weights(layer: Any, norms: list[Affine]) -> dict[str, np.ndarray] | None:
    """The weights with which the layer does what it and the normalizations did, one after another.

    Returns:
        All weights of the layer in float64 by the names of its attributes; None where one is not
        finite in the dtype of the layer's variables.
    """
    name, scaled = _scaling(layer)
    kernel = _float64(getattr(layer, name))
    own = getattr(layer, "bias", None)
    bias = np.zeros_like(norms[0].mean) if own is None else _float64(own)
    for mean, scale, beta in norms:
        kernel = scaled(kernel, scale)
        bias = (bias - mean) * scale + beta
    dtype = keras.backend.standardize_dtype(getattr(layer, name).dtype)
    # NumPy's own does not know bfloat16.
    limit = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    weights = {name: kernel, "bias": bias}
    # Written so that a NaN fails.
    if not all(bool(np.all(np.abs(array) <= limit)) for array in weights.values()):
        return None
    if type(layer) in _classes(_SEPARABLE):
        weights["depthwise_kernel"] = _float64(layer.depthwise_kernel)
    return weights


def _scaling(layer: Any) -> tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """The kernel's name, and how it is scaled by a factor for each channel of the outputs."""
    if type(layer) in _classes(_TRANSPOSED):  # (…, out, in)
        return "kernel", lambda kernel, scale: kernel * scale[:, None]
    if type(layer) in _classes(_DEPTHWISE):  # (…, in, multiplier), the outputs in that order
        return "kernel", lambda kernel, scale: kernel * scale.reshape(kernel.shape[-2:])
    if type(layer) in _classes(_SEPARABLE):
        return "pointwise_kernel", lambda kernel, scale: kernel * scale
    if type(layer) is keras.layers.EinsumDense:
        axis = _kernel_labels(layer).index(_einsum_label(layer) or "")
        return "kernel", lambda kernel, scale: np.moveaxis(
            np.moveaxis(kernel, axis, -1) * scale, -1, axis
        )
    return "kernel", lambda kernel, scale: kernel * scale


def _kernel_labels(layer: Any) -> str:
    return str(layer.equation).replace(" ", "").split("->")[0].split(",")[1]


def _einsum_label(layer: Any) -> str | None:
    """The label of the outputs' last axis, where kernel and bias are scaled along it alone."""
    label = str(layer.equation).replace(" ", "")[-1]
    if not label.isalpha() or label not in _kernel_labels(layer):
        return None
    return label if layer.bias_axes in (None, label) else None


def _classes(names: tuple[str, ...]) -> set[Any]:
    # By name: Keras's older versions lack some.
    return {getattr(keras.layers, name) for name in names if hasattr(keras.layers, name)}


def _float64(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable)).astype(np.float64)
