"""The backward from a layer's output in place of its input: `x̂ = (y − beta) / gamma`.

The output is rounded to its dtype, so that x̂ is off by about `(1 + |beta / gamma|) · u`, u half
the distance from 1 to the next number. Where too little of x̂ is left nothing goes on; that takes
a look at values, which code that XLA compiles cannot take.

References:
    Rota Bulò, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of
    DNNs", CVPR 2018, arXiv:1712.02616 (there the output is inverted twice: "InPlace-ABN I").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from syncbn._backends.interface import KeptOutput
from syncbn._backends.jax.passes import Scaling
from syncbn._backends.jax.values import known_value
from syncbn.errors import UnsupportedFeatureError

__all__ = ["before_activation", "check", "derivable_once", "of_output"]


def of_output(scaling: Scaling, gamma: Any, beta: Any) -> Scaling:
    """What makes x̂ of the output as `scaling` makes it of the input, the factor of dx the same."""
    return scaling._replace(mean=beta, mean_rest=jnp.zeros_like(beta), inverse=1 / gamma)


def before_activation(dy: Any, kept: Any, negative_slope: float) -> tuple[Any, Any]:
    """The cotangent of what the activation was applied to, and that itself, from its result."""
    if negative_slope == 1:
        return dy, kept
    # As the activation has rounded it.
    slope = jnp.asarray(negative_slope, kept.dtype).astype(jnp.promote_types(kept.dtype, "float32"))
    positive = kept > 0
    wide_dy, wide = dy.astype(slope.dtype), kept.astype(slope.dtype)
    return jnp.where(positive, wide_dy, wide_dy * slope), jnp.where(positive, wide, wide / slope)


def check(kept: KeptOutput, gamma: Any, beta: Any, dtype: Any) -> None:
    """Make sure that gamma and beta let the output be inverted.

    Args:
        kept: with the layer's name.
        gamma: shape (C,).
        beta: shape (C,).
        dtype: of the output.

    Raises:
        FloatingPointError: with the layer, the limits and the first channel beyond them.
    """
    information = jnp.finfo(dtype)
    # Far above the numbers that have fewer digits, or are taken for 0. float16 has no range for
    # that; there gamma, and a fifth of it by leaky_relu, have all their digits.
    least = float(information.tiny) * (5 if dtype == jnp.float16 else 1e8)
    # Half of the digits may be lost.
    most = 2.0 ** ((information.nmant + 1) // 2)
    gammas, betas = (known_value(vector) for vector in (gamma, beta))
    assert gammas is not None
    assert betas is not None
    # Written so that NaN is beyond.
    beyond = ~((np.abs(gammas) >= least) & (np.abs(betas) <= most * np.abs(gammas)))
    if not beyond.any():
        return
    first = int(beyond.argmax())
    raise FloatingPointError(
        f"Layer {kept.layer!r} with save='output' requires |gamma| of at least {least:g} and "
        f"|beta / gamma| of at most {most:.0f} in every channel, in {np.dtype(dtype).name}: the "
        "backward finds the normalized input by dividing by gamma. Received: "
        f"{int(beyond.sum())} channels that are not so, the first of them channel {first} with "
        f"gamma = {gammas[first]} and beta = {betas[first]} (with renorm, as corrected). Nothing "
        "has been updated by this call. Take save='input' for this layer, or keep gamma from 0, "
        "by its initializer (not zeros), a constraint, or less weight decay."
    )


def derivable_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, with an error for whoever would derive it."""

    @jax.custom_vjp
    def refusing(*arguments: Any) -> Any:
        return function(*arguments)

    def forward(*arguments: Any) -> tuple[Any, None]:
        return function(*arguments), None

    def backward(*_: Any) -> Any:
        raise UnsupportedFeatureError(
            "save='output' requires that gradients are not derived themselves: they depend on the "
            "input, which is not kept. Received: a gradient of a gradient through the layer. Take "
            "save='input' for it."
        )

    refusing.defvjp(forward, backward)
    return refusing(*arguments)
