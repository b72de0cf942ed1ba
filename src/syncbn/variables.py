"""A layer's variables, as a backend takes them."""

from __future__ import annotations

from typing import Any

from keras import ops

from syncbn._keras import xp
from syncbn.moments import Moments
from syncbn.renorm import corrections

__all__ = ["affine_of", "state_of"]


def state_of(layer: Any) -> dict[str, Any]:
    """The framework's variables of the size of the channels, by name."""
    names = ["moving_mean", "moving_variance", "gamma", "beta"]
    if layer.renorm:
        names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
    # Without gamma or beta the attribute is None, before Keras 3.5 missing.
    variables = {name: getattr(layer, name, None) for name in names}
    found = {name: variable for name, variable in variables.items() if variable is not None}
    if layer._wraps_variables:
        return {name: variable.value for name, variable in found.items()}
    return found


def _read(layer: Any, variable: Any) -> Any:
    """What operations take; in place, on a variable of tf_keras itself, they would change it."""
    return variable if layer._wraps_variables else variable.value()


def affine_of(layer: Any, moments: Moments) -> tuple[Any | None, Any | None]:
    """`(gamma, beta)` for a batch of these moments; with renorm corrected towards the past."""
    # Before Keras 3.5 the attribute is missing without the weight.
    gamma = _read(layer, layer.gamma) if layer.scale else None
    beta = _read(layer, layer.beta) if layer.center else None
    if not layer.renorm:
        return gamma, beta
    dtype = moments.mean.dtype
    mean, deviation = (ops.cast(w, dtype) for w in (layer.renorm_mean, layer.renorm_stddev))
    limited = corrections(moments, mean, deviation, layer.epsilon, layer._clipping, xp)
    r, d = map(ops.stop_gradient, limited)
    if gamma is not None:
        gamma = ops.cast(gamma, dtype)
        r, d = r * gamma, d * gamma
    return r, d if beta is None else d + ops.cast(beta, dtype)
