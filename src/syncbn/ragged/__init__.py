"""Ragged batches on JAX: any number of rows, on any number of devices and processes."""

from __future__ import annotations

import itertools
from typing import Any

from syncbn.errors import InputError, UnsupportedFeatureError

__all__ = ["distribute_dataset"]

_NUMBERS = itertools.count()


def distribute_dataset(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    shuffle: bool = False,
    class_weight: dict[int, float] | None = None,
    timeout: float = 300.0,
) -> Any:
    """Data for `fit`, `evaluate` and `predict` under `keras.distribution` on JAX, of any size.

    Keras on JAX refuses a batch whose rows do not divide over the devices (65 over 4), lets
    processes drift apart silently when they bring different numbers of rows, and waits for ever
    when they bring different numbers of batches. With

        model.fit(syncbn.distribute_dataset(x, y, batch_size=32), epochs=2)

    each step is one device's on the rows of all processes: Σ_p n_p rows, not one more. Loss,
    metrics, statistics of batches and weights are those of one device, for every layer: the model
    never sees padding. Its activations stay laid out over the devices, ⌈n/R⌉ rows each (a model
    that is not compiled by XLA computes a ragged batch whole on every device).

    On several processes each gives its own part of the data, with
    `DataParallel(auto_shard_dataset=False)` or ModelParallel, and the same calls in the same
    order; processes bring as many rows and batches as they have, and one that has run out, or
    has none, joins with no rows until all have. Before each step they tell each other what they
    have (once a pass for arrays).

    Args:
        x: NumPy arrays or tensors (dicts, lists, tuples of them), a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a generator, a torch `DataLoader`: whatever Keras takes.
            Everything but arrays yields batches (x,), (x, y) or (x, y, sample_weight).
        y: targets, with arrays only.
        sample_weight: weights in the loss, with arrays only. A row of weight 0 is a row: it
            counts in statistics and in the loss's mean, as with one device.
        batch_size: rows of one process's batches, with arrays only (Keras's default: 32).
        shuffle: whether each pass has an order of its own, as in `fit`, whose default is True.
        class_weight: weights of classes, as in `fit`.
        timeout: seconds to wait for another process's part of a batch.

    Returns:
        The first argument of `fit`, `evaluate` or `predict` (which Keras can on one process alone),
        or `validation_data`. It can be passed over again as often as `x` can. Keras ignores its own
        `y`, `sample_weight`, `batch_size`, `shuffle` and `class_weight` beside it: give them here.

    Raises:
        InputError: arguments or batches that cannot be used, also in a pass: rows that differ
            within a batch, structures that differ between processes.
        NotSynchronizableError: several processes without a distribution.
        UnsupportedFeatureError: Keras does not run on JAX, or is too old.
        WorkerError: a process failed, is late, or does something else; it says which.

    References:
        Keras 3, `keras.distribution.DataParallel`, whose layout of batches this fills.
    """
    data = {"x": x, "y": y, "sample_weight": sample_weight}
    return _adapted(
        timeout, **data, batch_size=batch_size, shuffle=shuffle, class_weight=class_weight
    )


def _adapted(timeout: float, **data: Any) -> Any:
    import keras

    if keras.backend.backend() != "jax":
        raise UnsupportedFeatureError(
            "distribute_dataset requires Keras on JAX. Received: keras.backend.backend()="
            f"{keras.backend.backend()!r}. On TensorFlow use syncbn.enable_multi_worker()."
        )
    if not timeout > 0:
        raise InputError(f"timeout must be a number of seconds above 0. Received: {timeout!r}.")

    from syncbn._backends.jax.coordination import Coordination, process_count
    from syncbn._keras import data_adapter
    from syncbn.ragged.adapter import RaggedAdapter
    from syncbn.ragged.agreement import Agreement

    agreement = (
        Agreement(Coordination(), str(next(_NUMBERS)), timeout) if process_count() > 1 else None
    )
    try:
        source = data_adapter(**data)
    except BaseException as error:
        if agreement is not None:
            agreement.fail("a data set", error)
        raise
    return RaggedAdapter(source, agreement)
