"""Which part of the data each worker reads: said explicitly, and checked at the start.

By default (`AutoShardPolicy.AUTO`) TensorFlow looks whether the dataset reads files, and then
gives each worker some of them, or fails. Here it is DATA: each worker reads its own part of the
same global batches, as one device would read them. FILE, OFF and datasets that are distributed
already are taken as they are; of OFF each epoch sees all that each worker has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.data_adapters.torch_data_loader_adapter import TorchDataLoaderAdapter
from keras.src.trainers.epoch_iterator import EpochIterator
from tensorflow.python.distribute.input_lib import DistributedDatasetsFromFunction

from syncbn.errors import InputError
from syncbn.multi_worker.board import exchange
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import (
    is_multi_worker,
    local_replica_count,
    replica_count,
    worker_count,
)

__all__ = ["is_needed", "patches"]

# Adapters of what Python yields, batch after batch.
OF_PYTHON = (PyDatasetAdapter, GeneratorDataAdapter, TorchDataLoaderAdapter)
Policy = tf.data.experimental.AutoShardPolicy


def is_needed() -> bool:
    """Whether Keras leaves the sharding of a dataset to TensorFlow."""
    return source_probe(
        "keras.src.backend.tensorflow.trainer.TFEpochIterator.__init__",
        broken="self._distribute_strategy.experimental_distribute_dataset(",
        mended="auto_shard_policy",
    )


def patches() -> list[Patch]:
    """The iterator's constructor."""
    return [Patch(TFEpochIterator, "__init__", _constructor)]


def _constructor(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(  # noqa: N807 - Keras's
        iterator: Any, distribute_strategy: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        strategy = distribute_strategy
        if strategy is None or replica_count(strategy) == 1:
            return original(iterator, strategy, *args, **kwargs)
        EpochIterator.__init__(iterator, *args, **kwargs)
        iterator._distribute_strategy = strategy
        dataset = without_nothing(iterator.data_adapter.get_tf_dataset())
        if isinstance(iterator.data_adapter, OF_PYTHON):
            dataset = dataset.map(_copies)
        iterator._distributed_dataset = distributed(strategy, dataset)
        if is_multi_worker(strategy) and not iterator.steps_per_epoch:
            iterator.data_adapter = _WithBatches(
                iterator.data_adapter,
                _agreed_batches(strategy, dataset, iterator.data_adapter.num_batches),
            )
            iterator._num_batches = iterator.data_adapter.num_batches
        return None

    return __init__


def without_nothing(dataset: Any) -> Any:
    """The dataset of a generator that yields `(x, y, None)`, without the None at the end.

    It is an empty Optional there, which TensorFlow cannot split.
    """
    spec = dataset.element_spec
    if isinstance(dataset, tf.distribute.DistributedDataset) or not isinstance(spec, tuple):
        return dataset
    kept = len(spec)
    while kept > 1 and isinstance(spec[kept - 1], tf.OptionalSpec):
        kept -= 1
    return dataset if kept == len(spec) else dataset.map(lambda *element: element[:kept])


def _copies(*element: Any) -> Any:
    """In memory of TensorFlow's own.

    It takes an array of Python's as it lies in memory, if it can, and replicas write their results
    where an input is used up: a PyDataset that returns views of its arrays finds them changed.
    """

    def copy(tensor: Any) -> Any:
        numeric = tensor.dtype not in {tf.string, tf.variant, tf.resource}
        return tf.raw_ops.DeepCopy(x=tensor) if numeric else tensor

    copied = tf.nest.map_structure(copy, element, expand_composites=True)
    return copied if len(element) > 1 else copied[0]


class _WithBatches:
    """A data adapter with another number of batches: that of the whole cluster."""

    def __init__(self, adapter: Any, num_batches: int | None) -> None:
        self._adapter = adapter
        self.num_batches = num_batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)


def policy_of(dataset: Any) -> Any:
    """How the dataset is sharded, or None if it is distributed already."""
    if isinstance(dataset, tf.distribute.DistributedDataset):
        return None
    policy = dataset.options().experimental_distribute.auto_shard_policy
    return Policy.DATA if policy == Policy.AUTO else policy


def distributed(strategy: Any, dataset: Any) -> Any:
    """This worker's part of the dataset, on its replicas.

    Raises:
        InputError: FILE was asked for, and a worker is left without a file.
    """
    policy = policy_of(dataset)
    if policy is None:
        return dataset
    if not is_multi_worker(strategy):
        return strategy.experimental_distribute_dataset(dataset)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = policy
    part = strategy.experimental_distribute_dataset(dataset.with_options(options))
    if policy == Policy.FILE:
        _check_files(strategy, part)
    return part


def _check_files(strategy: Any, part: Any) -> None:
    """Read one batch: TensorFlow says only then that there are too few files."""
    found = None
    try:
        if next(iter(part._cloned_datasets[0]), None) is None:
            found = "it has files without data"
    except (tf.errors.InvalidArgumentError, tf.errors.NotFoundError) as error:
        found = str(error).splitlines()[0][:200]
    every = exchange(strategy, "reading files", found)
    if any(every):
        words = "; ".join(f"worker {i}: {said}" for i, said in enumerate(every) if said)
        raise InputError(
            f"AutoShardPolicy.FILE requires a dataset that reads at least {worker_count(strategy)} "
            "files, one for each worker, from from_tensor_slices of their names or "
            f"Dataset.list_files. Received: {words}. Use more files or AutoShardPolicy.DATA."
        )


def _agreed_batches(strategy: Any, dataset: Any, own: int | None) -> int | None:
    """Steps of an epoch: as many as the worker with the most data needs.

    The others join with empty parts. None where a worker cannot tell beforehand.

    Raises:
        InputError: a worker has no data, or DATA was given different datasets.
    """
    policy = policy_of(dataset)
    every = exchange(strategy, "the start of the data", own)
    if policy == Policy.DATA and len(set(every)) > 1:
        raise InputError(
            "AutoShardPolicy.DATA requires the same dataset on every worker, of which each reads "
            f"its part. Received: {every} batches on workers 0 to {len(every) - 1}. Give every "
            "worker the whole dataset, or set AutoShardPolicy.OFF for datasets that are the "
            "workers' own parts."
        )
    if 0 in every:
        without = [index for index, batches in enumerate(every) if batches == 0]
        raise InputError(
            f"Training on {len(every)} workers requires data on each. Received: no batch on "
            f"worker {', '.join(map(str, without))}; {every} on workers 0 to {len(every) - 1}. "
            "Use AutoShardPolicy.DATA, or more data."
        )
    if None in every:
        return None
    most: int = max(every)
    if policy == Policy.OFF:
        # Every step takes a worker's share of a global batch.
        return most * len(every)
    if isinstance(dataset, DistributedDatasetsFromFunction):
        # One element a replica; of other datasets an element is a global batch.
        return math.ceil(most / local_replica_count(strategy))
    return most
