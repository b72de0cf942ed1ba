"""Which replicas normalize together: a partition of all of them, named in two ways.

Consecutive groups of one size, or any lists of replicas. Pure Python: what a partition is does not
depend on a framework, and is the same on every replica and worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from syncbn.errors import InputError

__all__ = ["Grouping", "Groups", "is_positive_integer"]

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Grouping:
    """The partition as it was asked for, before it is known how many replicas there are.

    Not a named tuple: Keras 3.0 copies one that a layer holds, all its values into the first field.
    """

    size: int | None = None  # consecutive groups of so many replicas
    assignment: Groups | None = None  # or these replicas, group by group

    @classmethod
    def of(cls, size: Any, assignment: Any) -> Grouping:
        """From the layer's arguments `group_size` and `group_assignment`.

        Raises:
            InputError: both are given, or one of them can be no partition of any replicas.
        """
        if size is not None and assignment is not None:
            raise InputError(
                "Groups of replicas require group_size or group_assignment, not both. Received: "
                f"group_size={size!r}, group_assignment={assignment!r}. Remove one."
            )
        if size is not None and not is_positive_integer(size):
            raise InputError(
                "group_size requires a number of replicas, an integer of at least 1. Received: "
                f"group_size={size!r}. Give one that divides the number of replicas."
            )
        if assignment is None:
            return cls(None if size is None else int(size))
        return cls(None, _checked(assignment))

    def over(self, replicas: int) -> Groups | None:
        """The groups of so many replicas, None for one group of all.

        Raises:
            InputError: this is no partition of so many replicas.
        """
        groups = self.assignment
        if self.size is not None:
            if replicas % self.size:
                raise InputError(
                    f"group_size requires a divisor of the number of replicas, {replicas}. "
                    f"Received: group_size={self.size}. Choose a divisor, or give "
                    "group_assignment for groups of different sizes."
                )
            starts = range(0, replicas, self.size)
            groups = tuple(tuple(range(start, start + self.size)) for start in starts)
        elif groups is not None:
            _check_covers(groups, replicas)
        return None if groups is None or len(groups) == 1 else groups


def is_positive_integer(value: Any) -> bool:
    """Whether it is a whole number of something, of at least one; True is not."""
    return _is_integer(value) and value >= 1


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _checked(assignment: Any) -> Groups:
    """The lists of replicas as tuples, if they can be a partition."""

    def refuse(what: str, remedy: str) -> NoReturn:
        raise InputError(
            "group_assignment requires lists of replicas, numbered from 0, in which every replica "
            f"is exactly once, as [[0, 1], [2, 3]]. Received: {what} in "
            f"group_assignment={assignment!r}. {remedy}"
        )

    def is_list(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str)

    if not is_list(assignment) or not assignment or not all(map(is_list, assignment)):
        refuse("something else than lists", "Give a list of lists of integers.")
    replicas = [replica for group in assignment for replica in group]
    if not all(len(group) for group in assignment):
        refuse("an empty group", "Remove it.")
    wrong = [replica for replica in replicas if not _is_integer(replica) or replica < 0]
    if wrong:
        refuse(f"{wrong!r}", "Number the replicas 0, 1, 2, and so on.")
    repeated = sorted({int(replica) for replica in replicas if replicas.count(replica) > 1})
    if repeated:
        refuse(f"replicas {repeated} more than once", "Leave each in one group.")
    return tuple(tuple(int(replica) for replica in group) for group in assignment)


def _check_covers(groups: Groups, replicas: int) -> None:
    named = {replica for group in groups for replica in group}
    found = [
        f"{what} {sorted(them)}"
        for what, them in (
            ("unknown replicas", named - set(range(replicas))),
            ("no group for replicas", set(range(replicas)) - named),
        )
        if them
    ]
    if found:
        raise InputError(
            f"group_assignment requires every replica of 0 to {replicas - 1} exactly once. "
            f"Received: {' and '.join(found)} in {[list(group) for group in groups]}. "
            "Name all the replicas that the strategy has, and no other."
        )
