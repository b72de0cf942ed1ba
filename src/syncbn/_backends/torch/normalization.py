"""Normalization by the moments of the global batch, with its gradient, on torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from syncbn._backends.interface import Batch, Scheme
from syncbn._backends.torch import collectives, health, inversion, virtual
from syncbn._backends.torch.function import Part, normalized
from syncbn._backends.torch.kernels import kernel_for
from syncbn._backends.torch.scaling import Scaling, statistics_dtype
from syncbn.groups import Groups
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
    dx is 0, its dy in no sum. The gradients of gamma and beta are those of this replica's part
    (`Σ dy·x̂` and `Σ dy` over it): training adds them up over the replicas, as it does those of
    every other weight.

    One collective forward and one backward, where the inputs have a gradient; none for one
    replica. The gradient keeps the input, or the output in its place, the weights, and vectors of
    the size of the channels.

    Args:
        batch: this replica's part. Inputs in float64, float32, bfloat16 or float16, any rank, any
            size, also 0.
        scheme: how to normalize.
        affine: gives gamma and beta, each of shape (C,), or None for ones and zeros, for the
            moments that normalize.

    Returns:
        The outputs, in the dtype of the inputs, and the moments of the union of all replicas:
        float64, or float32 on Apple's GPUs.

    Raises:
        NotSynchronizableError: the replicas cannot meet here.
        InputError: the groups are no partition of the replicas; NaN or infinity was looked for and
            found; the output is to be kept and cannot be inverted.
        torch._dynamo.exc.Unsupported: by `fullgraph=True`, of what has to be able to stop.

    References:
        Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167, 2015 (the gradient: section 3).
    """
    replicas = collectives.replicas_of(scheme.process_group)
    groups = scheme.grouping.over(replicas.size)
    if scheme.virtual_batch_size is not None:
        return virtual.normalize(batch, scheme, affine, replicas)
    return _by_groups(batch, scheme, affine, replicas, groups)


def _by_groups(
    batch: Batch,
    scheme: Scheme,
    affine: Callable[[Moments], tuple[Any | None, Any | None]],
    replicas: collectives.Replicas,
    groups: Groups | None,
) -> tuple[Any, Moments]:
    x = channels_last(batch.inputs, batch.axis)
    weights = None
    if batch.weights is not None:
        weights = channels_last(batch.weights.detach(), batch.axis)
    kernel = kernel_for(x, weights)
    with torch.no_grad():
        local = kernel.moments(x, weights, collectives.moments_dtype(x.device))
        if scheme.watch is not None:
            scheme.watch(local)
        moments, union = health.exchange(local, replicas, groups, batch.state, scheme.checked_layer)
    dtype = statistics_dtype(x.dtype)
    ones = torch.ones_like(moments.mean, dtype=dtype)
    gamma, beta = affine(moments)
    gamma = ones if gamma is None else value_of(gamma).to(dtype)
    beta = torch.zeros_like(ones) if beta is None else value_of(beta).to(dtype)
    if scheme.kept_output is not None:
        inversion.check(scheme.kept_output, gamma.detach(), beta.detach(), x.dtype)
    with torch.no_grad():
        scaling = Scaling.of(moments, gamma, beta, scheme.epsilon)
    slope = None if scheme.kept_output is None else scheme.kept_output.negative_slope
    part = Part(scheme.epsilon, replicas, groups, scheme.activation, slope)
    outputs = normalized(x, gamma, beta, scaling, moments.count, weights, part)
    return channels_back(outputs, batch.inputs, batch.axis), union


def channels_last(tensor: Any, axis: int) -> Any:
    """The tensor with its channels last and at least one axis before them; the same memory."""
    return (tensor if tensor.dim() > 1 else tensor[None]).movedim(axis, -1)


def channels_back(tensor: Any, inputs: Any, axis: int) -> Any:
    """The channels where they are in the inputs."""
    return (
        tensor.movedim(-1, axis).view(inputs.shape)
        if inputs.dim() == 1
        else (tensor.movedim(-1, axis))
    )


def value_of(weight: Any) -> Any:
    """The tensor of a Keras variable; a tensor itself."""
    return weight if isinstance(weight, torch.Tensor) else weight.value
