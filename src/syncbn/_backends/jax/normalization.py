"""Normalization by the moments of the global batch, with its gradient, on JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from syncbn._backends.interface import Activation, Batch, Scheme
from syncbn._backends.jax import collectives, health, inversion, passes, virtual
from syncbn._backends.jax.collectives import Replicas
from syncbn._backends.jax.gradients import (
    Part,
    local_moments,
    normalized,
    normalized_keeping_output,
)
from syncbn._backends.jax.places import Place, Stages
from syncbn.moments import Moments

__all__ = ["normalize"]


def normalize(
    batch: Batch, scheme: Scheme, affine: Callable[[Moments], tuple[Any | None, Any | None]]
) -> tuple[Any, Moments]:
    """Normalize by the moments of the concatenated batch of all replicas.

    `y = (x − mean) · gamma / √(variance + epsilon) + beta`, and for a cotangent dy of y

        dx = gamma / √(variance + epsilon) · (dy − w · Σ dy / n − w · x̂ · Σ dy·x̂ / n)

    where mean, the biased variance, n and both sums are over all replicas of the group, w is the
    weight of the element and n the sum of the weights; an element of weight 0 does not exist: its
    dx is 0, its dy in no sum. The gradients of gamma and beta are the sums over all replicas where
    JAX knows that gamma is the same on all of them, as in `shard_map` with `check_vma=True`, and
    else those of this replica's part, which who trains adds up as those of every other weight.

    One collective forward and one backward; none where the array is the whole batch and lies on one
    device.

    Args:
        batch: this replica's part, or the whole batch. Inputs in float64, float32, bfloat16 or
            float16, of any rank.
        scheme: how to normalize.
        affine: gives gamma and beta, each of shape (C,), or None for ones and zeros, for the
            moments that normalize.

    Returns:
        The outputs, in the dtype of the inputs, and the moments of the union of all replicas, in
        float64 where JAX has it, else in float32.

    Raises:
        NotSynchronizableError: an axis_name that is not bound.
        InputError: the groups are no partition of the replicas.
        UnsupportedFeatureError: what needs to raise an error by values, under `jit`.
        FloatingPointError: NaN or infinity was looked for and found, or the output is to be kept
            and cannot be inverted.

    References:
        Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167, 2015 (the gradient: section 3).
    """
    place = Place.of(batch, scheme)
    x, weights = batch.inputs, batch.weights
    if weights is not None:
        weights = lax.stop_gradient(weights)
    dtype = passes.statistics_dtype(x.dtype)
    (channels,) = next(iter(batch.state.values())).shape
    if scheme.virtual_batch_size is not None:
        stages = virtual.stages(batch, scheme, place.replicas)
    else:
        stages = _stages(batch, scheme, place.replicas)
    health.refuse_where_compiled(scheme, x)
    # The gradient of the second stage is that of the moments too.
    own, union = place.moments(stages.moments, lax.stop_gradient(x), weights)
    health.check(scheme.checked_layer, union, batch)
    gamma, beta = affine(own)
    gamma = jnp.ones(channels, dtype) if gamma is None else _vector(gamma, dtype)
    beta = jnp.zeros(channels, dtype) if beta is None else _vector(beta, dtype)
    if scheme.kept_output is not None:
        inversion.check(scheme.kept_output, gamma, beta, x.dtype)
    return place.outputs(stages.outputs, x, weights, own, gamma, beta), union


def _vector(variable: Any, dtype: Any) -> Any:
    """The value of a Keras variable, or an array, in the dtype."""
    return jnp.asarray(getattr(variable, "value", variable), dtype)


def _stages(batch: Batch, scheme: Scheme, replicas: Replicas) -> Stages:
    part = Part(batch.axis % batch.inputs.ndim, scheme.epsilon, replicas)

    def moments(x: Any, weights: Any | None) -> tuple[Moments, Moments]:
        return collectives.exchange(local_moments(part, x, weights), replicas)

    def outputs(x: Any, weights: Any | None, own: Moments, gamma: Any, beta: Any) -> Any:
        return normalized(part, x, gamma, beta, own, weights)

    if scheme.kept_output is None:
        return Stages(moments, _activated(scheme.activation, outputs))
    slope = scheme.kept_output.negative_slope
    keeping = part._replace(activation=scheme.activation, negative_slope=slope)

    def kept(x: Any, weights: Any | None, own: Moments, gamma: Any, beta: Any) -> Any:
        return normalized_keeping_output(keeping, x, gamma, beta, own, weights)

    return Stages(moments, kept)


def _activated(activation: Activation | None, outputs: Callable[..., Any]) -> Callable[..., Any]:
    """The activation of the outputs, which the backward computes again rather than keep."""
    if activation is None:
        return outputs
    again: Callable[..., Any] = jax.checkpoint(lambda *arguments: activation(outputs(*arguments)))
    return again
