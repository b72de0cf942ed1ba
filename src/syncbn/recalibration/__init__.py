"""Moving statistics of a model anew: exactly those of its data, in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from syncbn import _backends
from syncbn.errors import InputError
from syncbn.moments import Moments, merge
from syncbn.recalibration.layers import (
    Found,
    NotRecalibrated,
    find,
    moments_of,
    recalibrating,
)
from syncbn.recalibration.report import RecalibratedLayer, RecalibrationReport

__all__ = ["NotRecalibrated", "RecalibratedLayer", "RecalibrationReport", "recalibrate"]


def recalibrate(
    model: Any, dataset: Any, steps: int | None = None, *, batch_size: int | None = None
) -> RecalibrationReport:
    """Set the moving statistics of every batch normalization to those of the data, exactly.

    In one pass over the data, with all weights as they are,

        n = Σ_k n_k,   moving_mean = Σ_k n_k · mean_k / n
        moving_variance = (Σ_k M2_k + Σ_k n_k · (mean_k − moving_mean)²) / n

    where n_k, mean_k and M2_k are count, mean and summed squared deviations of the elements of a
    channel in the global batch k: each element counts once, whatever the sizes of the batches
    ("PreciseBN"). A moving average is one of the last batches, each made with other weights.

    The pass normalizes by the batch as training does, in SyncBatchNormalization and Keras's layer
    alike by the global one (groups, virtual batches and renorm by theirs), so that the layers above
    see what they saw in training: take its batch size, and shuffled data. All other layers are in
    inference: no dropout, no augmentation. The result does not depend on how a batch is split over
    replicas, workers or processes, all of which call this alike and hold the same bits after it;
    on torch each process feeds its own part, and one that has run out joins with empty batches.

    Left as they are, and reported: frozen layers (`trainable=False`), which the pass runs by their
    moving statistics; subclasses of both classes; layers that no element came to. With `renorm` the
    moving deviation is set too, and the statistics that training corrects by are not;
    `unbiased_moving_variance` divides by n − 1. `momentum` is not used, and
    `num_batches_tracked` (`momentum=None`) counts on from where it is. Compiled steps stay valid.

    Args:
        model: a built Keras model; under `tf.distribute` its own strategy's replicas take part.
        dataset: what `fit` takes: arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset`, a
            generator, a torch `DataLoader`, on JAX `syncbn.distribute_dataset(...)`. Batches are x,
            (x, y) or (x, y, sample_weight), a tuple of arrays too; y and sample_weight are ignored.
            x has the shape [N, …] that the model takes; N may differ from batch to batch.
            Masks count. Several inputs are a list or a dictionary.
        steps: at most so many global batches; None for all.
        batch_size: examples of a global batch, with arrays only (Keras's default: 32). They are
            taken in their order.

    Returns:
        Which layers, of how many elements, in how many steps, and what was left, as data.

    Raises:
        InputError: no built model; no layer to recalibrate; no data, or data without end and
            without `steps`; statistics that are NaN or infinite.
        NotSynchronizableError: the replicas cannot meet here.
        WorkerError: another worker or process is gone, late, or failed.
        Exception: whatever the data and the layers of the model raise. On any error, an interrupt
            too, the layers, their moving statistics and what is compiled are what they were.

    References:
        Wu, Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, 2021 (section 3).
    """
    _check(model, dataset, steps)
    return _recalibrated(model, _source(dataset, batch_size), steps)


def _recalibrated(model: Any, data: _Data, steps: int | None) -> RecalibrationReport:
    found, left = find(model)
    if not found:
        raise InputError(
            "Recalibration requires a model with a batch normalization that is trainable and has "
            f"been called. Received: {model.name!r} with "
            f"{', '.join(f'{one.path}: {one.reason}' for one in left[:3]) or 'none at all'}. Set "
            "`trainable = True` on layers that are to have new statistics."
        )
    backend = _backends.get(keras.backend.backend(), "recalibration")
    try:
        moments, taken = _gathered(model, backend, found, data, steps)
    finally:
        model._clear_losses()  # of steps that are over
    if not taken or not any(np.any(of_layer.count) for of_layer in moments):
        raise InputError(
            "Recalibration requires at least one example. Received: "
            f"{taken} batches without any. Give data that yields batches, again on each call."
        )
    changes = [
        change
        for one, of_layer in zip(found, moments, strict=True)
        for change in _changes(one, of_layer)
    ]
    with backend.scope(model):
        _assign(changes)
    return _report(model, taken, list(zip(found, moments, strict=True)), left)


def _report(
    model: Any,
    taken: int,
    layers: Sequence[tuple[Found, Moments]],
    left: Sequence[NotRecalibrated],
) -> RecalibrationReport:
    done, without = [], []
    for (path, layer), moments in layers:
        name = type(layer).__name__
        if np.any(moments.count):
            done.append(RecalibratedLayer(path, name, _count(moments.count)))
        else:
            without.append(NotRecalibrated(path, name, "no element came to it"))
    return RecalibrationReport(model.name, taken, tuple(done), (*left, *without))


class _Data(NamedTuple):
    """What the batches are made of."""

    x: Any
    batch_size: int | None


def _check(model: Any, dataset: Any, steps: Any) -> None:
    """Make sure that the arguments are what they have to be, as far as one can tell before."""
    if not isinstance(model, keras.Model):
        raise InputError(
            "Recalibration requires a model of Keras 3. Received: "
            f"{type(model).__module__}.{type(model).__qualname__}. Give the model itself; layers "
            "of your own go into a keras.Model."
        )
    if not model.built:
        raise InputError(
            f"Recalibration requires a model that is built. Received: {model.name!r}, which has "
            "never been called. Load its weights, or train it first."
        )
    is_number = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
    if steps is not None and not is_number:
        raise InputError(
            "Recalibration requires `steps` as a number of batches, at least 1, or None for all. "
            f"Received: steps={steps!r}."
        )
    if steps is None and _is_endless(dataset):
        raise InputError(
            f"Recalibration requires data that ends, or `steps`. Received: a "
            f"{type(dataset).__name__} without end, and steps=None. Give the number of batches to "
            "take."
        )


def _is_endless(dataset: Any) -> bool:
    if isinstance(dataset, keras.utils.PyDataset):
        return getattr(dataset, "num_batches", 0) is None
    if type(dataset).__module__.startswith("tensorflow.") and hasattr(dataset, "cardinality"):
        # Of a distributed data set it is no method.
        cardinality = dataset.cardinality
        size = cardinality() if callable(cardinality) else cardinality
        return int(size) == -1  # tf.data.INFINITE_CARDINALITY
    return False


def _source(dataset: Any, batch_size: int | None) -> _Data:
    """The data for Keras's adapters: x of a tuple of arrays, on JAX of any size of batches."""
    x = dataset[0] if isinstance(dataset, tuple) and dataset else dataset
    if keras.backend.backend() == "jax" and keras.distribution.distribution() is not None:
        from keras.src.trainers.data_adapters.data_adapter import DataAdapter

        from syncbn.ragged import distribute_dataset

        if not isinstance(x, DataAdapter):
            x = distribute_dataset(x, batch_size=batch_size)
    return _Data(x, batch_size)


def _gathered(
    model: Any, backend: Any, found: Sequence[Found], data: _Data, steps: int | None
) -> tuple[list[Moments], int]:
    """The moments of each layer over all steps, merged in float64, and how many steps it took."""
    zeros = [np.zeros(one.layer.moving_mean.shape[0]) for one in found]
    totals = [Moments(zero, zero, zero) for zero in zeros]
    taken = 0
    with contextlib.ExitStack() as stack:
        gathered = stack.enter_context(
            recalibrating(found, backend.moments_dtype(model), lambda: backend.scope(model))
        )
        vectors: Iterator[Any] = backend.vectors(model, data, gathered, steps)
        stack.enter_context(contextlib.closing(vectors))  # type: ignore[type-var]
        for vector in vectors:
            batch = moments_of(found, vector)
            _check_finite(found, batch, taken)
            totals = [merge(*pair, np) for pair in zip(totals, batch, strict=True)]
            taken += 1
    return totals, taken


def _check_finite(found: Sequence[Found], batch: Sequence[Moments], step: int) -> None:
    for one, moments in zip(found, batch, strict=True):
        channels = np.flatnonzero(~np.isfinite(moments.mean + moments.m2 + moments.count))
        if channels.size:
            raise InputError(
                "Recalibration requires finite statistics. Received: NaN or infinity in "
                f"{channels.size} of {moments.mean.size} channels, the first {channels[0]}, of "
                f"{one.path} in batch {step}, counted from 0. Look for NaN in the data, in the "
                "weights of the layers before, and for sums that overflow. The moving statistics "
                "are what they were."
            )


def _changes(one: Found, moments: Moments) -> list[tuple[Any, Any]]:
    """Variables of a layer, and what they are to hold; channels without an element keep theirs."""
    layer = one.layer
    unbiased = getattr(layer, "unbiased_moving_variance", False)
    variance = moments.unbiased_variance(np) if unbiased else moments.variance(np)
    new = {"moving_mean": moments.mean, "moving_variance": variance}
    if getattr(layer, "renorm", False):
        new["moving_stddev"] = np.sqrt(variance + layer.epsilon)
    changes = []
    for name, value in new.items():
        variable = getattr(layer, name)
        old = keras.ops.convert_to_numpy(variable)
        with np.errstate(over="ignore"):
            value = np.where(moments.count > 0, value, old).astype(old.dtype)
        if not np.all(np.isfinite(value[moments.count > 0].astype(np.float64))):
            raise InputError(
                f"Recalibration requires statistics that {old.dtype} can hold. Received: more than "
                f"its largest number for {name} of {one.path}. Give the layer a larger dtype, or "
                "scale the data down."
            )
        changes.append((variable, value))
    return changes


def _assign(changes: Sequence[tuple[Any, Any]]) -> None:
    """Give all variables their values, or none."""
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable, _ in changes]
    try:
        for variable, value in changes:
            variable.assign(value)
    except BaseException:
        for (variable, _), value in zip(changes, before, strict=True):
            variable.assign(value)
        raise


def _count(counts: Any) -> float | tuple[float, ...]:
    """One number where all channels have the same."""
    return float(counts[0]) if np.all(counts == counts[0]) else tuple(map(float, counts))
