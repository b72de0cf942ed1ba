"""Workers shuffle alike: by the chief's seed and the number of the epoch.

Without a seed every worker draws its own permutation of the arrays (of the batches of a PyDataset)
and reads its part of that: some examples come twice an epoch and others not at all. With the epoch
in it, and not how often was drawn, a resumed fit has the orders of the one that it resumes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer, TFEpochIterator
from keras.src.callbacks.callback_list import CallbackList
from keras.src.trainers.data_adapters import py_dataset_adapter
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from syncbn.multi_worker import fits
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
    """What begins a fit and an epoch, what starts an epoch of data, how a PyDataset is shuffled."""
    return [
        Patch(TensorFlowTrainer, "fit", _fit),
        Patch(CallbackList, "on_epoch_begin", _epoch_begins),
        Patch(TFEpochIterator, "_get_iterator", _epoch),
        Patch(py_dataset_adapter, "random", _RandomOfPyDatasets),
    ]


def _fit(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def fit(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_multi_worker(model.distribute_strategy):
            return original(model, *args, **kwargs)
        with fits.inside():
            try:
                return original(model, *args, **kwargs)
            finally:
                _order_of_py_datasets(None)

    return fit


def _epoch_begins(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def on_epoch_begin(callbacks: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        fit = fits.current()
        strategy = getattr(callbacks._model, "distribute_strategy", None)
        if fit is not None and strategy is not None and is_multi_worker(strategy):
            fit.epoch = epoch
            seed = fit.agreed_seed(strategy)
            if not fit.counts_passes:
                # Now, as a PyDataset with threads shuffles before its iterator is asked for.
                _order_of_py_datasets((seed, epoch))
        original(callbacks, epoch, *args, **kwargs)

    return on_epoch_begin


def _epoch(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_iterator(iterator: Any) -> Any:
        strategy = iterator._distribute_strategy
        adapter = getattr(iterator.data_adapter, "_adapter", iterator.data_adapter)
        if not is_multi_worker(strategy):
            return original(iterator)
        if isinstance(adapter, py_dataset_adapter.PyDatasetAdapter) and adapter.shuffle:
            _order_of_py_datasets(_order(iterator))
            return original(iterator)
        if not isinstance(adapter, ArrayDataAdapter) or not adapter._shuffle:
            return original(iterator)
        with _shuffled_by(fits.generator(*_order(iterator)).randrange(2**31)):
            dataset = adapter.get_tf_dataset()
        return strategy.experimental_distribute_dataset(dataset)

    return _get_iterator


def _order(iterator: Any) -> tuple[int, int]:
    """The seed and the number of what is about to be read.

    The epoch's, or with `steps_per_epoch` that of the pass over the data, as that may be longer.
    """
    running = fits.current()
    # None in a loop of one's own over Keras's iterator.
    fit = running or iterator.__dict__.setdefault("_syncbn_fit", fits.Fit())
    seed = fit.agreed_seed(iterator._distribute_strategy)
    if running and not iterator.steps_per_epoch:
        return seed, running.epoch
    fit.counts_passes = True
    number = iterator.__dict__.setdefault("_syncbn_pass", fit.epoch)
    iterator._syncbn_pass += 1
    return seed, number


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
        self.order: tuple[int, int] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def shuffle(self, indices: list[int]) -> None:
        """In place. The same however often it is called: Keras makes iterators that it drops."""
        order = self.order
        (self._module if order is None else fits.generator(*order)).shuffle(indices)


def _order_of_py_datasets(order: tuple[int, int] | None) -> None:
    module = py_dataset_adapter.random
    if isinstance(module, _RandomOfPyDatasets):  # not where the repair has been undone meanwhile
        module.order = order
