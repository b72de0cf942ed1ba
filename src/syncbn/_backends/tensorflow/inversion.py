"""The backward from a layer's output in place of its input: `x̂ = (y − beta) / gamma`.

The output is rounded to its dtype, so that x̂ is off by about `(1 + |beta / gamma|) · u`, u half
the distance from 1 to the next number. Where too little of x̂ is left nothing goes on.

References:
    Rota Bulò, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of
    DNNs", CVPR 2018, arXiv:1712.02616 (there the output is inverted twice: "InPlace-ABN I").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._backends.interface import KeptOutput
from syncbn._backends.tensorflow import health, xla
from syncbn._backends.tensorflow.scaling import Scaling
from syncbn.errors import UnsupportedFeatureError
from syncbn.moments import Moments

__all__ = ["before_activation", "checked", "derivable_once", "of_output"]

# The digits of a number, in bits. |beta / gamma| may cost x̂ half of them: up to √(1 / u).
_DIGITS = {tf.float64: 53, tf.float32: 24, tf.float16: 11, tf.bfloat16: 8}

# Far above the numbers that have fewer digits, or are taken for 0. float16 has no range for that;
# there gamma, and a fifth of it by leaky_relu, have all their digits.
_LEAST_GAMMA = {tf.float64: 1e-290, tf.float32: 1e-30, tf.float16: 3.1e-4, tf.bfloat16: 1e-30}


def of_output(scaling: Scaling, beta: Any, negative_slope: float, dtype: Any) -> Scaling:
    """What makes x̂ of the output as `scaling` makes it of the input, the factor of dx the same.

    Args:
        scaling: of the forward.
        beta: shape (C,), as it was added.
        negative_slope: of the activation below 0; 1 for none.
        dtype: of the output, to which the activation rounds its slope.
    """
    # TensorFlow's slopes are float32 numbers, whatever they multiply.
    slope = float(np.float32(negative_slope).astype(tf.as_dtype(dtype).as_numpy_dtype))
    return scaling._replace(
        mean=beta,
        mean_rest=tf.zeros_like(beta),
        inverse=1 / scaling.gamma,
        negative_slope=slope,
    )


def before_activation(dy: Any, kept: Any, negative_slope: float) -> tuple[Any, Any]:
    """The cotangent of what the activation was applied to, and that itself, from its result."""
    if negative_slope == 1:
        return dy, kept
    positive = kept > 0
    return (
        tf.where(positive, dy, dy * negative_slope),
        tf.where(positive, kept, kept / negative_slope),
    )


def checked(
    kept: KeptOutput, gamma: Any, beta: Any, dtype: Any, union: Moments
) -> tuple[Any, Any, Moments]:
    """What the call goes on with, where gamma and beta let the output be inverted.

    They are the same on every replica, so that all of them stop here or none does.

    Raises:
        InvalidArgumentError: from TensorFlow, with the layer, the limits and the first channel
            beyond them.
        UnsupportedFeatureError: XLA compiles this, and would leave the check out.
    """
    health.refuse_xla(kept.layer, "save='output'", "or take save='input'")
    least, most = _LEAST_GAMMA[dtype], 2.0 ** (_DIGITS[dtype] // 2)
    count, *first = xla.run(_beyond, gamma, beta, least=least, most=most)
    # Without quotes, which an assertion in a graph would print with backslashes.
    report = tf.strings.format(
        f"Layer {kept.layer} with save=output requires |gamma| of at least {least:g} and "
        f"|beta / gamma| of at most {most:.0f} in every channel, in {dtype.name}: the backward "
        "finds the normalized input by dividing by gamma. Received: {} channels that are not so, "
        "the first of them channel {} with gamma = {} and beta = {} (with renorm, as corrected). "
        "Nothing has been updated by this call. Take save=input for this layer, or keep gamma from "
        "0, by its initializer (not zeros), a constraint, or less weight decay.",
        (count, *first),
    )
    check = tf.debugging.Assert(count == 0, [report])
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(gamma), tf.identity(beta), Moments(*map(tf.identity, union))


def _beyond(gamma: Any, beta: Any, least: float, most: float) -> tuple[Any, Any, Any, Any]:
    """How many channels cannot be inverted, and of the first its number, gamma and beta."""
    size = tf.abs(gamma)
    # Written so that NaN is beyond.
    beyond = ~((size >= least) & (tf.abs(beta) <= most * size))
    first = tf.argmax(beyond, output_type=tf.int32)
    return tf.reduce_sum(tf.cast(beyond, tf.int32)), first, gamma[first], beta[first]


def derivable_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, with an error for whoever would derive it by one of them."""

    @tf.custom_gradient
    def refusing(*arguments: Any) -> tuple[Any, Callable[..., Any]]:
        def gradient(*_: Any) -> Any:
            raise UnsupportedFeatureError(
                "save='output' requires that gradients are not derived themselves: they depend on "
                "the input, which is not kept. Received: a gradient of a gradient through the "
                "layer. Take save='input' for it."
            )

        return function(*arguments), gradient

    return refusing(*arguments)
