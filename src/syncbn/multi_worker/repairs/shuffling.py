"""Workers shuffle alike: by the chief's seed, another one each epoch.

Without a seed every worker draws its own permutation of the arrays (of the batches of a PyDataset)
and reads its part of that: some examples come twice an epoch and others not at all.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.trainers.data_adapters import py_dataset_adapter
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from syncbn.multi_worker.board import agree
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import is_multi_worker

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether a permutation depends on the worker."""
    return source_probe(
        "keras.src.trainers.data_adapters.array_data_adapter.ArrayDataAdapter.get_tf_dataset",
        broken="indices = tf.random.shuffle(indices)",
        mended="stateless_shuffle",
    )


def patches() -> list[Patch]:
    """What starts an epoch of arrays, and by what a PyDataset is shuffled."""
    return [
        Patch(TFEpochIterator, "_get_iterator", _epoch),
        Patch(py_dataset_adapter, "random", _RandomOfPyDatasets),
    ]


def agreed_generator(strategy: Any) -> random.Random:
    """A generator that gives the same numbers on every worker.

    Seeded from the chief's `random`, so that `keras.utils.set_random_seed` reproduces it.
    """
    return random.Random(agree(strategy, "the seed of the shuffle", random.randrange(2**31)))


def _epoch(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_iterator(iterator: Any) -> Any:
        strategy = iterator._distribute_strategy
        adapter = getattr(iterator.data_adapter, "_adapter", iterator.data_adapter)
        if not is_multi_worker(strategy):
            return original(iterator)
        if isinstance(adapter, py_dataset_adapter.PyDatasetAdapter) and adapter.shuffle:
            py_dataset_adapter.random.generator = agreed_generator(strategy)
            return original(iterator)
        if not isinstance(adapter, ArrayDataAdapter) or not adapter._shuffle:
            return original(iterator)
        if not hasattr(iterator, "_shuffle_generator"):
            iterator._shuffle_generator = agreed_generator(strategy)
        with _shuffled_by(iterator._shuffle_generator.randrange(2**31)):
            dataset = adapter.get_tf_dataset()
        return strategy.experimental_distribute_dataset(dataset)

    return _get_iterator


@contextlib.contextmanager
def _shuffled_by(seed: int) -> Iterator[None]:
    """Datasets of arrays that are made here are permuted by the seed.

    Keras calls `tf.random.shuffle` while it makes them, and takes no seed for it.
    """
    original = tf.random.shuffle

    def shuffle(indices: Any) -> Any:
        # With shuffle="batch" the first index tells one batch from another.
        first = tf.cast(indices[0], tf.int64)
        return tf.random.experimental.stateless_shuffle(indices, tf.stack([seed, first]))

    tf.random.shuffle = shuffle
    try:
        yield
    finally:
        tf.random.shuffle = original


class _RandomOfPyDatasets(ModuleType):
    """The module `random` with a `shuffle` that may be agreed upon."""

    def __init__(self, module: Any) -> None:
        super().__init__(module.__name__, module.__doc__)
        self._module = module
        self.generator: random.Random | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def shuffle(self, indices: list[int]) -> None:
        """In place."""
        (self.generator or self._module).shuffle(indices)
