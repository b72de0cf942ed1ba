"""A ragged global batch inside `jax.jit`: sent padded, seen by the model as its n rows alone.

Arrays that enter a compiled function must divide evenly over the devices; inside, they need not.
So the rows are sent padded to an even size, in an object that JAX knows as a container of arrays
(a pytree node). Where a compiled function unpacks its arguments, the object becomes the array of
the n rows, laid out over the batch axis as unevenly as it is: layers, loss and metrics, Keras's
and others, see the true batch, and nothing of Keras is replaced. XLA masks the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from syncbn.places import Places

__all__ = ["RaggedArray", "ragged_array"]


class _Facts(NamedTuple):
    """What the compiled function depends on, apart from the arrays."""

    rows: int  # n
    slot_rows: int  # L
    sent_rows: int  # T
    moves: int
    sharding: Any  # of the n rows


class RaggedArray:
    """An array of n rows on its way into a compiled function.

    Args:
        sent: [R*T, ...], of which a process first holds its own part alone.
        moves: [2*moves, 1, ...] int32, on every slot: rows that move, from and to.
        facts: what is known of them while Python runs.
    """

    def __init__(self, sent: Any, moves: Any, facts: _Facts) -> None:
        self.sent, self.moves, self.facts = sent, moves, facts

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows that the model sees."""
        return (self.facts.rows, *self.sent.shape[1:])

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of its elements."""
        return self.sent.dtype

    # A model that is not compiled takes the array where it needs one: whole on every device then.
    def __jax_array__(self) -> jax.Array:
        return _rows(self.sent, self.moves, self.facts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.__jax_array__(), dtype)


def _rows(sent: Any, moves: Any, facts: _Facts) -> jax.Array:
    """The n rows of the R*T sent."""
    slots = sent.shape[0] // facts.sent_rows
    placed = sent
    if facts.sent_rows > facts.slot_rows:
        by_slot = sent.reshape(slots, facts.sent_rows, *sent.shape[1:])
        placed = by_slot[:, : facts.slot_rows].reshape(-1, *sent.shape[1:])
    if facts.moves:
        sources, targets = moves[: 2 * facts.moves].reshape(2, facts.moves)
        placed = placed.at[targets].set(sent[sources])
    return jnp.asarray(placed[: facts.rows])


def _unpacked(facts: _Facts, children: Any) -> Any:
    sent, moves = children
    # JAX unpacks also where it moves arrays to devices, and with placeholders of its own.
    if not isinstance(sent, jax.core.Tracer):
        return RaggedArray(sent, moves, facts)
    return jax.lax.with_sharding_constraint(_rows(sent, moves, facts), facts.sharding)


jax.tree_util.register_pytree_node(
    RaggedArray, lambda array: ((array.sent, array.moves), array.facts), _unpacked
)


def ragged_array(local: Any, places: Places, shard: int, slots: int, sharding: Any) -> RaggedArray:
    """A process's own part of an array, [own rows, ...], to be made global by Keras.

    Args:
        local: the rows of this process.
        places: where they are to lie.
        shard: which part this process has.
        slots: how many slots it fills.
        sharding: JAX's, of the n rows over the devices.
    """
    local = np.asarray(local)
    positions = places.positions[shard]
    sent = filled(local, (slots * places.sent_rows, *local.shape[1:]))
    sent[positions] = local
    moves = np.concatenate([places.sources, places.targets])
    moves = np.tile(moves, slots).reshape(-1, *[1] * (local.ndim - 1))
    if not len(moves):
        moves = np.zeros((slots, *[1] * (local.ndim - 1)), np.int32)
    facts = _Facts(places.rows, places.slot_rows, places.sent_rows, len(places.sources), sharding)
    return RaggedArray(sent, moves, facts)


def filled(local: Any, shape: tuple[int, ...]) -> Any:
    """What lies beyond the rows: their first once more.

    XLA masks it. Should a kernel compute on it all the same, then on numbers that the model bears.
    """
    return np.broadcast_to(local[:1] if len(local) else np.zeros((), local.dtype), shape).copy()
