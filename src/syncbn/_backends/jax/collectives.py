"""Sums over the replicas, and the moments that they give: one collective each."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from syncbn._backends.jax.axes import Axes
from syncbn.groups import Groups
from syncbn.moments import Moments, merge_table, pack_row, pack_sums, unpack_sums

__all__ = ["Replicas", "exchange", "moments_dtype", "sum_over_group", "sum_over_replicas"]


class Replicas(NamedTuple):
    """Who normalizes together, seen from one of them."""

    axes: Axes = ()  # mapped axes; none where the array is the whole batch
    count: int = 1
    groups: Groups | None = None  # None for one group of all


def moments_dtype() -> Any:
    """The dtype of the moments: float64 where JAX has it, `jax_enable_x64`, else float32."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def sum_over_replicas(vector: Any, axes: Axes) -> Any:
    """The elementwise sum of every replica's array, the same bits on all of them."""
    return lax.psum(vector, axes)


def exchange(local: Moments, replicas: Replicas) -> tuple[Moments, Moments]:
    """Moments of this replica's group and of the union of all, by one collective.

    The payload: in float64 `(n, n·mean, M2 + n·mean²)`, a row for each group where there are
    several; in float32 a row of `(n, mean, M2)` for each replica. It is gathered by a sum of tables
    that are zero but for one row: of what `all_gather` returns JAX does not know that it is the
    same everywhere, so that no moving statistic could leave `shard_map` as replicated.

    Args:
        local: those of this replica's part, in `moments_dtype()`.
        replicas: who takes part.
    """
    if not replicas.axes:
        return local, local
    one_count = local.count.ndim == 0
    if local.mean.dtype == jnp.float64:
        unpack = functools.partial(unpack_sums, xp=jnp, one_count=one_count)
        row = pack_sums(local, jnp)
        if replicas.groups is None:
            union = unpack(sum_over_replicas(row, replicas.axes))
            return union, union
        own = _this_group(replicas)
        table = _in_slot(row, own, len(replicas.groups))
        table = sum_over_replicas(table, replicas.axes)
        return unpack(table[own]), unpack(jnp.sum(table, axis=0))
    merge = functools.partial(merge_table, xp=jnp, one_count=one_count)
    row = pack_row(local, jnp)
    table = _in_slot(row, lax.axis_index(replicas.axes), replicas.count)
    table = sum_over_replicas(table, replicas.axes)
    union = merge(table)
    if replicas.groups is None:
        return union, union
    members = _group_of_each(replicas.groups) == _this_group(replicas)
    # A row of another group may hold a NaN.
    return merge(jnp.where(members[:, None], table, 0.0)), union


def sum_over_group(vector: Any, replicas: Replicas) -> tuple[Any, Any | None]:
    """The sum over this replica's group, and that over all; None where it would cost a collective.

    Args:
        vector: shape (n,).
        replicas: who takes part; alone in its group a replica sends nothing.
    """
    groups = replicas.groups
    if not replicas.axes or (groups and all(len(group) == 1 for group in groups)):
        return vector, None
    if groups is None:
        total = sum_over_replicas(vector, replicas.axes)
        return total, total
    own = _this_group(replicas)
    table = sum_over_replicas(_in_slot(vector, own, len(groups)), replicas.axes)
    return table[own], jnp.sum(table, axis=0)


def _group_of_each(groups: Groups) -> Any:
    """The number of the group of each replica, shape (R,)."""
    group_of = {replica: number for number, group in enumerate(groups) for replica in group}
    return jnp.array([group_of[replica] for replica in sorted(group_of)])


def _this_group(replicas: Replicas) -> Any:
    assert replicas.groups is not None
    return _group_of_each(replicas.groups)[lax.axis_index(replicas.axes)]


def _in_slot(vector: Any, slot: Any, slots: int) -> Any:
    """A table of shape (slots, …) of zeros with the vector in one row.

    Not a product with a one-hot vector: a NaN would enter every row.
    """
    return jnp.where(jnp.arange(slots)[:, None] == slot, vector, jnp.zeros((), vector.dtype))
