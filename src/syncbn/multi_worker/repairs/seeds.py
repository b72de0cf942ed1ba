"""Random numbers differ between replicas: dropout, noise, augmentation.

A SeedGenerator has the same state on every replica, so that each draws the same mask for its part
of the batch. The replica's number is folded into what it draws; the state moves as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.random.seed_generator import SeedGenerator

from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import in_replica

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether a seed does not depend on the replica."""
    return source_probe(
        "keras.src.random.seed_generator.SeedGenerator.next",
        broken="new_seed_value = seed_state.value * 1",
        mended="replica_id",
    )


def patches() -> list[Patch]:
    """`SeedGenerator.next`."""
    return [Patch(SeedGenerator, "next", _drawer)]


def _drawer(original: Callable[..., Any]) -> Callable[..., Any]:
    def next(generator: Any, ordered: bool = True) -> Any:  # noqa: A001 - Keras's name
        seed = original(generator, ordered)
        if not in_replica():
            return seed
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        folded = tf.random.fold_in(tf.cast(seed, tf.int32), replica)
        return tf.cast(folded, seed.dtype)

    return next
