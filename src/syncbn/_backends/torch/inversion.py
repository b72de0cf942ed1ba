"""The backward from a layer's output in place of its input: `x̂ = (y − beta) / gamma`.

The output is rounded to its dtype, so that x̂ is off by about `(1 + |beta / gamma|) · u`, u half
the distance from 1 to the next number. Where too little of x̂ is left nothing goes on.

References:
    Rota Bulò, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of
    DNNs", CVPR 2018, arXiv:1712.02616 (there the output is inverted twice: "InPlace-ABN I").
"""

from __future__ import annotations

from typing import Any

import torch

from syncbn._backends.interface import KeptOutput
from syncbn._backends.torch import health
from syncbn._backends.torch.scaling import Scaling
from syncbn.errors import InputError, UnsupportedFeatureError

__all__ = ["before_activation", "check", "of_output", "refuse_derivation"]

# The digits of a number, in bits. |beta / gamma| may cost x̂ half of them: up to √(1 / u).
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}

# Far above the numbers that have fewer digits, or are taken for 0. float16 has no range for that;
# there gamma, and a fifth of it by leaky_relu, have all their digits.
_LEAST_GAMMA = {
    torch.float64: 1e-290,
    torch.float32: 1e-30,
    torch.float16: 3.1e-4,
    torch.bfloat16: 1e-30,
}


def of_output(scaling: Scaling, gamma: Any, beta: Any) -> Scaling:
    """What makes x̂ of the output as `scaling` makes it of the input, the factor of dx the same."""
    return scaling._replace(mean=beta, mean_rest=torch.zeros_like(beta), inverse=1 / gamma)


def before_activation(dy: Any, kept: Any, negative_slope: float) -> tuple[Any, Any]:
    """The cotangent of what the activation was applied to, and that itself, from its result."""
    if negative_slope == 1:
        return dy, kept
    # By torch's own rounding of the slope, and above half precision.
    dtype = torch.promote_types(kept.dtype, torch.float32)
    dy, kept = dy.to(dtype), kept.to(dtype)
    positive = kept > 0
    return (
        torch.where(positive, dy, dy * negative_slope),
        torch.where(positive, kept, kept / negative_slope),
    )


@health.outside_of_compilation
def check(kept: KeptOutput, gamma: Any, beta: Any, dtype: Any) -> None:
    """Make sure that gamma and beta let the output be inverted.

    They are the same on every replica, so that all of them stop here or none does.

    Raises:
        InputError: with the layer, the limits and the first channel beyond them.
    """
    least, most = _LEAST_GAMMA[dtype], 2.0 ** (_DIGITS[dtype] // 2)
    size = gamma.abs()
    # Written so that NaN is beyond.
    beyond = ~((size >= least) & (beta.abs() <= most * size))
    count = int(beyond.sum())
    if count:
        first = int(beyond.nonzero()[0, 0])
        raise InputError(
            f"Layer {kept.layer} with save=output requires |gamma| of at least {least:g} and "
            f"|beta / gamma| of at most {most:.0f} in every channel, in "
            f"{str(dtype).removeprefix('torch.')}: the backward finds the normalized input by "
            f"dividing by gamma. Received: {count} channels that are not so, the first of them "
            f"channel {first} with gamma = {float(gamma[first])} and beta = {float(beta[first])} "
            "(with renorm, as corrected). Nothing has been updated by this call. Take save=input "
            "for this layer, or keep gamma from 0, by its initializer (not zeros), a constraint, "
            "or less weight decay."
        )


def refuse_derivation() -> None:
    """Raise for whoever would derive the gradient of a layer that keeps its output."""
    raise UnsupportedFeatureError(
        "save='output' requires that gradients are not derived themselves: they depend on "
        "the input, which is not kept. Received: a gradient with create_graph=True through the "
        "layer. Take save='input' for it."
    )
