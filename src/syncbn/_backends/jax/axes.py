"""Which mapped axes there are where the layer is called, and over which of them a value varies."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import jax
from jax import lax

from syncbn.errors import NotSynchronizableError

__all__ = ["Axes", "manual_axes", "mapped_axes", "summed_like", "varying"]

Axes = tuple[Hashable, ...]


def mapped_axes(
    inputs: Any, axis_name: str | tuple[str, ...] | None, state: Iterable[Any] = ()
) -> Axes:
    """The axes to sum over: those named, or else those that the inputs are mapped over.

    A manual axis of a mesh over which the inputs do not vary holds copies of them, not further
    parts; one over which the layer's variables vary holds other channels. Where JAX does not follow
    who varies (`check_vma=False`, `pmap`) an axis that is alone is that of the batch.

    Args:
        inputs: this replica's part.
        axis_name: as the layer was asked for; `vmap`, and `pmap` before JAX 0.8, are found by it
            alone.
        state: the layer's variables.

    Returns:
        The names; none where there is no mapped axis, and the array is the whole batch.

    Raises:
        NotSynchronizableError: a name that is not bound here, or no name where it is needed.
    """
    if axis_name is not None:
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        unbound = [name for name in names if not _is_bound(name)]
        if unbound:
            raise NotSynchronizableError(
                f"axis_name={axis_name!r} requires that the layer is called in training inside "
                "jax.shard_map, jax.pmap or jax.vmap(axis_name=...) over an axis of that name. "
                f"Received: a call where {unbound} is not bound; bound manual axes: "
                f"{list(manual_axes())}. Correct the name, or leave axis_name out: in jax.jit, "
                "with or without keras.distribution, an array is the whole batch already."
            )
        return names
    manual = manual_axes()
    own = varying(inputs)
    found = tuple(name for name in manual if name in own) or manual
    of_channels = [name for name in found if any(name in varying(value) for value in state)]
    if of_channels or (len(manual) > 1 and not own):
        reason = (
            f"variables of the layer that vary over {of_channels}, as channels do that are split"
            if of_channels
            else "inputs of which JAX does not say over which of them they vary (check_vma=False)"
        )
        raise NotSynchronizableError(
            "Synchronized training inside several mapped axes requires to know which of them split "
            f"the batch. Received: mapped axes {list(manual)}, and {reason}. Name the axes of the "
            "batch: SyncBatchNormalization(axis_name='data')."
        )
    return found


def manual_axes() -> Axes:
    """The axes of `shard_map`, and of `pmap` since JAX 0.8, that the code runs inside of."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _is_bound(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def varying(value: Any) -> frozenset[Hashable]:
    """The mapped axes over which a value differs, as far as JAX follows that."""
    kind = jax.typeof(value)
    # JAX 0.10 has renamed it.
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", ()))


def summed_like(cotangent: Any, primal: Any) -> Any:
    """The cotangent as JAX wants it of a value: the sum over the axes that only itself varies over.

    With `check_vma=True` the cotangent of what is the same on all replicas is the same on all; else
    each replica has its own, and who trains adds them up.
    """
    extra = varying(cotangent) - varying(primal)
    return lax.psum(cotangent, tuple(sorted(extra, key=str))) if extra else cotangent
