"""Sums over the replicas, and the moments that they give: one collective each."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    size: int = 1  # how many there are
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
    form = _Form.of(local)
    row = form.pack(local)
    own = None if replicas.groups is None else _this_group(replicas)
    if form.is_sum:
        if own is None:
            union = form.unpack(sum_over_replicas(row, replicas.axes))
            return union, union
        table = sum_over_replicas(_in_slot(row, own, len(replicas.groups or ())), replicas.axes)
        return form.unpack(table[own]), form.unpack(jnp.sum(table, axis=0))
    slot = lax.axis_index(replicas.axes)
    table = sum_over_replicas(_in_slot(row, slot, replicas.size), replicas.axes)
    union = form.unpack(table)
    if own is None:
        return union, union
    members = _along_rows(_group_of_each(replicas.groups or ()) == own, table)
    # A row of another group may hold a NaN.
    return form.unpack(jnp.where(members, table, 0.0)), union


class _Form(NamedTuple):
    """How moments travel: as one row, and from what arrives back to moments."""

    is_sum: bool  # whether rows are added up; else they are merged as a table
    pack: Callable[[Moments], Any]
    unpack: Callable[[Any], Moments]

    @classmethod
    def of(cls, local: Moments) -> _Form:
        """By what of the mesh XLA still divides, and whether there is float64."""
        is_sum = local.mean.dtype == jnp.float64
        pack: Callable[..., Any] = pack_sums if is_sum else pack_row
        unpack: Callable[..., Any] = unpack_sums if is_sum else merge_table
        one_count = local.count.ndim == 0
        if not _channels_may_be_split():
            return cls(
                is_sum,
                functools.partial(pack, xp=jnp),
                functools.partial(unpack, xp=jnp, one_count=one_count),
            )
        # Each channel by itself, in a column: one after the other the three vectors would have to
        # be brought together from the devices that their parts are on.
        columns = jax.vmap(functools.partial(pack, xp=jnp), out_axes=-1)
        merge = jax.vmap(functools.partial(unpack, xp=jnp, one_count=False), in_axes=-1)

        def pack_columns(moments: Moments) -> Any:
            parts = (jnp.broadcast_to(part, moments.mean.shape) for part in moments)
            return columns(Moments(*(part[:, None] for part in parts)))

        return cls(is_sum, pack_columns, lambda table: Moments(*(v[:, 0] for v in merge(table))))


def _channels_may_be_split() -> bool:
    """Whether the mesh has axes that are not mapped here, over which XLA lays out what it wants."""
    mesh = jax.sharding.get_abstract_mesh()
    return len(mesh.axis_names) > len(mesh.manual_axes) > 0


def sum_over_group(vector: Any, replicas: Replicas) -> tuple[Any, Any | None]:
    """The sum over this replica's group, and that over all; None where it would cost a collective.

    Args:
        vector: any shape.
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
    own = _along_rows(jnp.arange(slots) == slot, vector[None])
    return jnp.where(own, vector, jnp.zeros((), vector.dtype))


def _along_rows(rows: Any, table: Any) -> Any:
    """One value for each row of a table, as it is broadcast against it."""
    return jnp.expand_dims(rows, tuple(range(1, table.ndim)))
