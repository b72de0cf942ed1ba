"""Sums over the processes of a process group, and the moments that they give."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from syncbn._backends.torch import leaving  # noqa: F401 - registers what it does at the end
from syncbn._backends.torch.namespace import xp
from syncbn.errors import NotSynchronizableError
from syncbn.groups import Groups
from syncbn.moments import Moments, merge_table, pack_row, pack_sums, unpack_sums

__all__ = [
    "Exchanged",
    "Replicas",
    "exchange",
    "moments_dtype",
    "ranks_of",
    "replicas_of",
    "replicas_of_model",
    "rows_of_replicas",
    "sum_over_group",
]


class Replicas(NamedTuple):
    """The processes that train in step with this one, itself included."""

    size: int = 1
    own: int = 0  # the number of this process among them
    group: Any = None  # of torch.distributed; None for a process that is alone


def replicas_of(process_group: Any) -> Replicas:
    """The processes of the group, of the default group for None.

    Raises:
        NotSynchronizableError: they cannot meet here.
    """
    started = dist.is_available() and dist.is_initialized()
    if isinstance(process_group, Sequence):
        if started and dist.get_world_size() > 1:
            raise NotSynchronizableError(
                "Synchronized training requires a process group of torch.distributed. Received: "
                f"process_group={list(process_group)}, the ranks that a file keeps of one. Set "
                "`layer.process_group = torch.distributed.new_group(ranks)`, or None for all "
                "processes, on every layer before the training goes on."
            )
        process_group = None
    if not started:
        if process_group is None:
            return Replicas()
        raise NotSynchronizableError(
            "Synchronized training with a process_group requires that torch.distributed is "
            "initialized. Received: a process group, and no torch.distributed.init_process_group "
            "in this process, or one that has been destroyed. Call it first, or set "
            "`layer.process_group = None`."
        )
    group = dist.group.WORLD if process_group is None else process_group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise _not_a_member("torch.distributed.GroupMember.NON_GROUP_MEMBER")
    own = dist.get_rank(group)
    if own < 0:
        raise _not_a_member(f"one of ranks {ranks_of(group)}")
    size = dist.get_world_size(group)
    if process_group is not None and not torch.compiler.is_compiling():
        ranks_of(group)  # notes them
    return Replicas() if size == 1 else Replicas(size, own, group)


def replicas_of_model(model: Any) -> Replicas:
    """The processes that the layers of a model meet: of their group if they share one, else all."""
    groups = {
        id(layer.process_group): layer.process_group
        for layer in model._flatten_layers()
        if hasattr(layer, "process_group")
    }
    (group,) = groups.values() if len(groups) == 1 else (None,)
    return replicas_of(group)


def _not_a_member(group: str) -> NotSynchronizableError:
    error: NotSynchronizableError = NotSynchronizableError(
        "Synchronized training requires a process group that this process is a member of. "
        f"Received: process_group={group} in the process of rank {dist.get_rank()}. Give each "
        "process the group that it belongs to, as new_subgroups returns it; processes outside of "
        "the group are not to train this layer."
    )
    return error


def ranks_of(process_group: Any) -> list[int]:
    """The global ranks of the processes of a group, in their order there.

    Raises:
        NotSynchronizableError: this process is not a member of the group.
    """
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise _not_a_member("torch.distributed.GroupMember.NON_GROUP_MEMBER")
    if process_group not in _RANKS:
        _RANKS[process_group] = list(dist.get_process_group_ranks(process_group))
    return list(_RANKS[process_group])


# Of every group that a layer has trained with: one that has been destroyed knows them no more, and
# a model is saved after that as often as before.
_RANKS: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()


def moments_dtype(device: Any) -> Any:
    """The dtype of the moments that replicas exchange: float64, but float32 on Apple's GPUs."""
    return torch.float64 if _has_float64(device) else torch.float32


def _has_float64(device: Any) -> bool:
    return bool(device.type != "mps")


class _Sum(torch.autograd.Function):
    """The sum over the replicas, whose gradient is the sum of the gradients over the replicas."""

    @staticmethod
    def forward(ctx: Any, vector: Any, group: Any) -> Any:
        ctx.group = group
        return _all_reduce(vector.clone(), group)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, None]:
        return _Sum.apply(cotangent.contiguous(), ctx.group), None


def sum_over_replicas(vector: Any, replicas: Replicas) -> Any:
    """The elementwise sum of every replica's vector, the same bits on all of them.

    One collective. Every replica must come here, also one whose part of the batch is empty.

    Args:
        vector: new memory of the caller's, which becomes the sum; but where gradients of gradients
            are taken.
        replicas: more than one.

    Raises:
        NotSynchronizableError: torch.distributed cannot sum up, or has waited in vain.
    """
    if vector.requires_grad and not torch.compiler.is_compiling():
        return _Sum.apply(vector, replicas.group)
    return _all_reduce(vector, replicas.group)


def _all_reduce(vector: Any, group: Any) -> Any:
    if torch.compiler.is_compiling():
        dist.all_reduce(vector, group=group)
        return vector
    try:
        dist.all_reduce(vector, group=group)
    except RuntimeError as error:
        raise NotSynchronizableError(
            f"Synchronized training requires that all {dist.get_world_size(group)} processes of "
            "the group call the layer in each step, forward and backward, and a group whose "
            f"backend sums tensors on {vector.device.type!r}. Received in the process of rank "
            f"{dist.get_rank()}, from torch.distributed: {error} Look for a process that has "
            "ended, or has fewer batches than the others; one without examples calls the layer "
            "with an empty batch. How long to wait is `timeout=` of init_process_group and "
            "new_group."
        ) from error
    return vector


class Exchanged(NamedTuple):
    """What every replica knows after the forward collective."""

    own: Moments  # of the group that this replica normalizes with
    union: Moments  # of all replicas; the same bits on each
    faults: Any | None  # shape (R,): the number that each replica gave


def exchange(
    local: Moments, replicas: Replicas, groups: Groups | None = None, fault: Any | None = None
) -> Exchanged:
    """Moments of the concatenated batch, by one collective; by none for one replica.

    The payload of the forward collective: `(n, n·mean, M2 + n·mean²)`, 2C+1 float64, a row for each
    group where there are several; in float32 a row of `(n, mean, M2)` for each replica.

    Args:
        local: those of this replica's part, in `moments_dtype()`.
        replicas: who takes part.
        groups: lists of replicas, each of which normalizes by itself; None for one group of all.
        fault: a number to tell the others, shape (), or None for nothing.
    """
    if replicas.size == 1:
        return Exchanged(local, local, None if fault is None else fault[None])
    one_count = local.count.dim() == 0
    as_sums = local.mean.dtype == torch.float64
    row = (pack_sums if as_sums else pack_row)(local, xp)
    if not as_sums:
        table = _in_slot(row, replicas.own, replicas.size)
    elif groups is None:
        table = row[None]
    else:
        table = _in_slot(row, _group_of(replicas.own, groups), len(groups))
    shape = table.shape
    if fault is None:
        total = sum_over_replicas(table.flatten(), replicas)
        faults = None
    else:
        slots = _in_slot(fault[None], replicas.own, replicas.size).flatten()
        total = sum_over_replicas(torch.cat([table.flatten(), slots]), replicas)
        total, faults = total[: -replicas.size], total[-replicas.size :]
    of = _of_sums if as_sums else _of_table
    return Exchanged(*of(total.view(shape), replicas, groups, one_count), faults)


def _of_sums(
    table: Any, replicas: Replicas, groups: Groups | None, one_count: bool
) -> tuple[Moments, Moments]:
    unpack = functools.partial(unpack_sums, xp=xp, one_count=one_count)
    if groups is None:
        union = unpack(table[0])
        return union, union
    return unpack(table[_group_of(replicas.own, groups)]), unpack(table.sum(0))


def _of_table(
    table: Any, replicas: Replicas, groups: Groups | None, one_count: bool
) -> tuple[Moments, Moments]:
    merge = functools.partial(merge_table, xp=xp, one_count=one_count)
    union = merge(table)
    if groups is None:
        return union, union
    return merge(table[list(groups[_group_of(replicas.own, groups)])]), union


def sum_over_group(vector: Any, replicas: Replicas, groups: Groups | None = None) -> Any:
    """The sum of the vector over this replica's group, by one collective; none where it is alone.

    Args:
        vector: shape (n,), new memory of the caller's.
        replicas: who takes part.
        groups: who belongs together; None for all.
    """
    if replicas.size == 1 or (groups is not None and all(len(group) == 1 for group in groups)):
        return vector
    if groups is None:
        return sum_over_replicas(vector, replicas)
    own = _group_of(replicas.own, groups)
    table = _in_slot(vector, own, len(groups))
    return sum_over_replicas(table.flatten(), replicas).view(table.shape)[own]


def rows_of_replicas(row: Any, replicas: Replicas) -> Any:
    """The row of each replica, shape (R, n), the same bits on all of them; one collective.

    Args:
        row: shape (n,), of one size on every replica.
        replicas: who takes part.
    """
    if replicas.size == 1:
        return row[None]
    return sum_over_replicas(_in_slot(row, replicas.own, replicas.size), replicas)


def _group_of(replica: int, groups: Groups) -> int:
    return next(number for number, group in enumerate(groups) if replica in group)


def _in_slot(vector: Any, slot: int, slots: int) -> Any:
    """A table of shape (slots, …) of zeros with the vector in one row."""
    zeros = torch.zeros_like(vector)
    return torch.stack([vector if number == slot else zeros for number in range(slots)])
