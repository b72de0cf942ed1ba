"""The outputs of one replica's part as functions with a gradient of their own."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax

from syncbn._backends.interface import Activation
from syncbn._backends.jax import collectives, inversion, passes
from syncbn._backends.jax.axes import summed_like, varying
from syncbn._backends.jax.collectives import Replicas
from syncbn.moments import Moments

__all__ = ["Part", "local_moments", "normalized", "normalized_keeping_output"]


class Part(NamedTuple):
    """What forward and backward of one call have in common, and is known to Python."""

    axis: int  # that of the channels, from 0
    epsilon: float
    replicas: Replicas
    activation: Activation | None = None  # of the function that keeps its output, and its
    negative_slope: float = 1.0  # slope below 0


def local_moments(part: Part, x: Any, weights: Any | None) -> Moments:
    """Those of this replica's part, in the dtype in which they travel."""
    return passes.local_moments(x, weights, part.axis, collectives.moments_dtype())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalized(
    part: Part, x: Any, gamma: Any, beta: Any, moments: Moments, weights: Any | None
) -> Any:
    """The outputs, with a gradient that knows that the moments are those of the inputs.

    Args:
        part: all that is no array.
        x: this replica's part.
        gamma: shape (C,).
        beta: shape (C,).
        moments: of the group.
        weights: of the elements, or None.
    """
    del weights
    scaling = passes.Scaling.of(moments, gamma, part.epsilon)
    return passes.apply(x, scaling, beta, part.axis)


def _normalized_forward(part: Part, *arguments: Any) -> tuple[Any, Any]:
    return normalized(part, *arguments), arguments


def _normalized_backward(part: Part, arguments: Any, dy: Any) -> tuple[Any, ...]:
    return *_gradient(part, dy, *arguments), None, None


normalized.defvjp(_normalized_forward, _normalized_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(part: Part, dy: Any, *arguments: Any) -> tuple[Any, Any, Any]:
    """The gradients of x, gamma and beta, themselves differentiable."""
    return _gradient_of_input(part, dy, *arguments)


def _gradient_forward(part: Part, *arguments: Any) -> tuple[Any, Any]:
    return _gradient_of_input(part, *arguments), arguments


def _gradient_backward(part: Part, arguments: Any, cotangents: Any) -> tuple[Any, ...]:
    *derivable, _, weights = arguments

    def again(dy: Any, x: Any, gamma: Any, beta: Any) -> tuple[Any, Any, Any]:
        # The moments depend on x, and here that counts: compute them again, from operations that
        # JAX can derive. Two more collectives, paid by gradients of gradients only.
        moments, _ = collectives.exchange(local_moments(part, x, weights), part.replicas)
        return _gradient_of_input(part, dy, x, gamma, beta, moments, weights)

    _, pull_back = jax.vjp(again, *derivable)
    return *pull_back(cotangents), None, None


_gradient.defvjp(_gradient_forward, _gradient_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalized_keeping_output(part: Part, x: Any, *arguments: Any) -> Any:
    """The activation of the outputs, with a gradient that finds what it needs in the result."""
    gamma, beta, moments, _ = arguments
    y = passes.apply(x, passes.Scaling.of(moments, gamma, part.epsilon), beta, part.axis)
    return y if part.activation is None else part.activation(y)


def _keeping_forward(part: Part, *arguments: Any) -> tuple[Any, Any]:
    y = normalized_keeping_output(part, *arguments)
    return y, (y, *arguments[1:])


def _keeping_backward(part: Part, kept: Any, dy: Any) -> tuple[Any, ...]:
    def of_output(dy: Any, y: Any, gamma: Any, beta: Any, moments: Any, weights: Any) -> Any:
        scaling = passes.Scaling.of(moments, gamma, part.epsilon)
        backward = inversion.of_output(scaling, gamma, beta)
        pair = inversion.before_activation(dy, y, part.negative_slope)
        dx, *rest = _gradient_of_part(part, *pair, gamma, beta, moments, weights, backward)
        return dx.astype(y.dtype), *rest

    return *inversion.derivable_once(of_output, dy, *kept), None, None


normalized_keeping_output.defvjp(_keeping_forward, _keeping_backward)


def _gradient_of_input(
    part: Part, dy: Any, x: Any, gamma: Any, beta: Any, moments: Moments, weights: Any | None
) -> tuple[Any, Any, Any]:
    scaling = passes.Scaling.of(moments, gamma, part.epsilon)
    return _gradient_of_part(part, dy, x, gamma, beta, moments, weights, scaling)


def _gradient_of_part(
    part: Part,
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    moments: Moments,
    weights: Any | None,
    scaling: passes.Scaling,
) -> tuple[Any, Any, Any]:
    """The gradients of x, gamma and beta, as JAX wants them of these."""
    local = passes.sums(dy, x, weights, scaling, part.axis)
    own, of_all = collectives.sum_over_group(local, part.replicas)
    correction = passes.Correction.of(own, moments.count, scaling)
    dx = passes.gradient(dy, x, weights, scaling, correction, part.axis)

    def of_weight(row: int, weight: Any) -> Any:
        extra = varying(local) - varying(weight)
        # What the collective has summed already, where it is over the same axes.
        if of_all is not None and extra == {*part.replicas.axes}:
            return of_all[row]
        return summed_like(local[row], weight)

    return summed_like(dx, x), of_weight(1, gamma), of_weight(0, beta)
