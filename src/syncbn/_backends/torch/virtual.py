"""Virtual ("ghost") batches: a few examples of a replica that normalize by themselves.

Only the moving statistics are synchronized, so that torch's own gradient is the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from syncbn._backends.interface import Batch, Scheme
from syncbn._backends.torch import collectives, health
from syncbn._backends.torch.collectives import Replicas
from syncbn._backends.torch.composed import where_counted
from syncbn._backends.torch.namespace import xp
from syncbn._backends.torch.scaling import statistics_dtype
from syncbn.errors import InputError
from syncbn.moments import Moments, as_divisor, merge_table

__all__ = ["normalize"]


def normalize(
    batch: Batch,
    scheme: Scheme,
    affine: Callable[[Moments], tuple[Any | None, Any | None]],
    replicas: Replicas,
) -> tuple[Any, Moments]:
    """Normalize every `virtual_batch_size` examples by their own moments, the last fewer by theirs.

    Returns:
        The outputs, and the moments of the union of all examples of all replicas; one collective.
    """
    layout = _Layout.of(batch, scheme.virtual_batch_size or 1)
    moments, rough, rest = _moments(layout)
    with torch.no_grad():
        # A row for each virtual batch, of which only the count and the channels are left.
        rows = [part.reshape(part.shape[0], part.shape[-1]) for part in moments]
        table = torch.cat(rows, dim=1).to(collectives.moments_dtype(layout.x.device))
        local = merge_table(table, xp, one_count=rows[0].shape[1] == 1)
        if scheme.watch is not None:
            scheme.watch(local)
        _, union = health.exchange(local, replicas, None, batch.state, scheme.checked_layer)
    gamma, beta = affine(union)
    scale = torch.rsqrt(moments.variance(xp) + scheme.epsilon)
    if gamma is not None:
        scale = scale * _value(gamma).to(scale.dtype)
    offset = -rest * scale
    if beta is not None:
        # The mean is in two parts: `x − rough` is exact where the mean is large.
        offset = offset + _value(beta).to(scale.dtype)

    # What is masked gets an output by the statistics, and no gradient goes through it.
    outputs = (where_counted(layout.weights, layout.x) - rough) * scale + offset
    if batch.weights is not None:
        of_masked = ((layout.x - rough) * scale + offset).detach()
        outputs = torch.where(layout.weights > 0, outputs, of_masked)
    outputs = layout.restored(outputs.to(batch.inputs.dtype))
    return (outputs if scheme.activation is None else scheme.activation(outputs)), union


def _value(weight: Any) -> Any:
    return weight if isinstance(weight, torch.Tensor) else weight.value


class _Layout(NamedTuple):
    """The examples by virtual batch, filled up with elements of weight 0."""

    x: Any  # shape (virtual batches, examples of one, …, channels)
    weights: Any  # the same, but 1 or all channels
    restored: Callable[[Any], Any]  # from the shape of x to that of the inputs

    @classmethod
    def of(cls, batch: Batch, size: int) -> _Layout:
        rank = batch.inputs.dim()
        axis = batch.axis % rank
        if axis == 0:
            raise InputError(
                "virtual_batch_size requires examples on the first axis of the inputs. Received: "
                f"axis={batch.axis} for inputs of rank {rank}, whose channels are there. Remove "
                "virtual_batch_size."
            )
        dtype = statistics_dtype(batch.inputs.dtype)
        x = batch.inputs.to(dtype).movedim(axis, -1)
        examples = x.shape[0]
        weights = torch.ones([1] * rank, dtype=dtype, device=x.device)
        if batch.weights is not None:
            weights = batch.weights.detach().to(dtype).movedim(axis, -1)
        # No more than there are, or the batch would be filled up to any size.
        size = min(size, max(examples, 1))
        missing = -examples % size

        def by_batch(tensor: Any) -> Any:
            tensor = tensor.expand(*x.shape[:-1], tensor.shape[-1])
            tensor = torch.nn.functional.pad(tensor, [0, 0] * (rank - 1) + [0, missing])
            return tensor.reshape((examples + missing) // size, size, *tensor.shape[1:])

        def restored(y: Any) -> Any:
            return y.reshape(examples + missing, *x.shape[1:])[:examples].movedim(-1, axis)

        return cls(by_batch(x), by_batch(weights), restored)


def _moments(layout: _Layout) -> tuple[Moments, Any, Any]:
    """Moments of each virtual batch, shape (batches, 1, …, C), and the two parts of the mean."""

    def total(values: Any) -> Any:
        return values.sum(dim=tuple(range(1, values.dim() - 1)), keepdim=True)

    count = total(layout.weights)
    divisor = as_divisor(count, xp)
    # A mean that is only nearly right, which everything below is independent of.
    counted = where_counted(layout.weights, layout.x)
    rough = (total(layout.weights * counted) / divisor).detach()
    deviations = where_counted(layout.weights, layout.x - rough)
    rest = total(layout.weights * deviations) / divisor
    m2 = total(layout.weights * deviations.square()) - count * rest.square()
    return Moments(count, rough + rest, torch.clamp(m2, min=0)), rough, rest
