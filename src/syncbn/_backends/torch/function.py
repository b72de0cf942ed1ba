"""The normalization as a function of torch's autograd: both passes, and the backward's collective.

`torch.compile` traces it with both its collectives into one graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from syncbn._backends.interface import Activation
from syncbn._backends.torch import collectives, inversion
from syncbn._backends.torch.collectives import Replicas
from syncbn._backends.torch.composed import composed, where_counted
from syncbn._backends.torch.kernels import kernel_for
from syncbn._backends.torch.scaling import Correction, Scaling
from syncbn.groups import Groups

__all__ = ["Part", "normalized"]


class Part(NamedTuple):
    """What forward and backward of one call have in common but tensors."""

    epsilon: float
    replicas: Replicas
    groups: Groups | None
    activation: Activation | None
    kept_slope: float | None  # of an activation whose result is kept; None to keep the input


def normalized(
    x: Any, gamma: Any, beta: Any, scaling: Scaling, count: Any, weights: Any | None, part: Part
) -> Any:
    """The outputs, with a gradient that knows that the moments are those of the inputs.

    Args:
        x: the inputs, channels last.
        gamma: shape (C,).
        beta: shape (C,).
        scaling: of the moments of the group, with gamma and beta; a constant.
        count: of the group.
        weights: of each element, or None.
        part: the rest.
    """
    recomputed = part.activation is not None and part.kept_slope is None
    if torch.compiler.is_compiling() and recomputed:
        # The compiler computes again by itself what is cheap.
        outputs = _Normalized.apply(
            x, gamma, beta, weights, count, part._replace(activation=None), *scaling
        )
        assert part.activation is not None
        return part.activation(outputs)
    return _Normalized.apply(x, gamma, beta, weights, count, part, *scaling)


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        gamma: Any,
        beta: Any,
        weights: Any | None,
        count: Any,
        part: Part,
        *scaling: Any,
    ) -> Any:
        outputs = kernel_for(x, None).apply(x, Scaling(*scaling))
        if part.activation is not None:
            outputs = part.activation(outputs)
        kept = x if part.kept_slope is None else outputs
        ctx.save_for_backward(kept, gamma, beta, weights, count, *scaling)
        ctx.part = part
        return outputs

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        kept, gamma, beta, weights, count, *vectors = ctx.saved_tensors
        part, scaling = ctx.part, Scaling(*vectors)
        no_others = (None,) * (3 + len(vectors))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if part.kept_slope is not None:
                inversion.refuse_derivation()
            return *_derivable(dy, kept, gamma, beta, weights, part), *no_others
        kernel = kernel_for(kept, weights)
        if part.kept_slope is not None:
            dy, kept = inversion.before_activation(dy, kept, part.kept_slope)
            scaling = inversion.of_output(scaling, gamma, beta)
        elif part.activation is not None:
            dy = _through_activation(dy, kernel.apply(kept, scaling), part.activation)
        sums = kernel.sums(dy, kept, weights, scaling)
        normalized = sums.normalized(scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            total = torch.cat([sums.outputs, normalized])
            total = collectives.sum_over_group(total, part.replicas, part.groups)
            correction = Correction.of(total, count, scaling)
            dx = kernel.gradient(dy, kept, weights, scaling, correction)
        return dx, normalized, sums.outputs, *no_others


def _through_activation(dy: Any, z: Any, activation: Activation) -> Any:
    """The cotangent of what the activation is applied to, which is computed again."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (dz,) = torch.autograd.grad(activation(z), z, dy)
    return dz


def _derivable(
    dy: Any, x: Any, gamma: Any, beta: Any, weights: Any | None, part: Part
) -> tuple[Any, Any, Any]:
    """The same gradient by operations that torch derives, for gradients of gradients.

    The moments depend on x, and here that counts: they are computed again. One more collective, and
    as many again to derive them, paid by gradients of gradients alone.
    """
    local = composed.moments(x, weights, collectives.moments_dtype(x.device))
    moments = collectives.exchange(local, part.replicas, part.groups).own
    scaling = Scaling.of(moments, gamma, beta, part.epsilon)
    if part.activation is not None:
        # What does not exist may be NaN, and would come back by the derivative of this.
        z = composed.apply(where_counted(weights, x), scaling)
        (dy,) = torch.autograd.grad(part.activation(z), z, dy, create_graph=True)
    sums = composed.sums(dy, x, weights, scaling)
    normalized = sums.normalized(scaling)
    total = torch.cat([sums.outputs, normalized])
    total = collectives.sum_over_group(total, part.replicas, part.groups)
    correction = Correction.of(total, moments.count, scaling)
    return composed.gradient(dy, x, weights, scaling, correction), normalized, sums.outputs
