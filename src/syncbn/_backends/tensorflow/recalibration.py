"""The steps of a recalibration on the replicas of the model's strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator

from syncbn._backends.tensorflow import collectives
from syncbn._backends.tensorflow.tracing import traced_apart
from syncbn.errors import WorkerError

__all__ = ["moments_dtype", "scope", "vectors"]


def scope(model: Any) -> Any:
    """The context in which variables of the model are made and assigned."""
    return model.distribute_strategy.scope()


def moments_dtype(model: Any) -> str:
    """In which the replicas exchange moments."""
    with scope(model):
        return str(collectives.moments_dtype().name)


def vectors(model: Any, data: Any, gathered: Sequence[Any], steps: int | None) -> Iterator[Any]:
    """What was gathered in each step, all variables in one vector; the same on every replica.

    Args:
        model: called in inference on each global batch.
        data: `x` and `batch_size`, for Keras's adapters.
        gathered: variables, set to 0 before each step.
        steps: at most so many; None for all.
    """
    strategy = model.distribute_strategy
    # Keras's own, so that `fit` and this take the same data, in the same parts.
    epoch = TFEpochIterator(
        x=data.x, batch_size=data.batch_size, shuffle=False, distribute_strategy=strategy
    )
    step = _step(model, gathered, strategy)
    # Keras before 3.6 has no such note.
    getattr(epoch.data_adapter, "on_epoch_begin", lambda: None)()
    try:
        iterator = iter(epoch._distributed_dataset)
        taken = 0
        while taken != steps:
            # Outside of the scope all workers' operations would run on the first one.
            with strategy.scope():
                try:
                    vector = step(iterator).numpy()
                except (tf.errors.OutOfRangeError, StopIteration):  # the latter without a graph
                    return
                except tf.errors.UnavailableError as error:
                    raise WorkerError(
                        "Recalibration on several workers requires all of them. Received: a "
                        "collective that another worker has left. See what that one printed last. "
                        "The moving statistics are what they were."
                    ) from error
            yield vector
            taken += 1
    finally:
        epoch.data_adapter.on_epoch_end()


def _step(model: Any, gathered: Sequence[Any], strategy: Any) -> Any:
    # Functions that users' layers compile would else be what was traced of them in inference, with
    # layers that do not gather, and inference afterwards what is traced here. On several replicas
    # layers refuse to be in any.
    apart = traced_apart if strategy.num_replicas_in_sync == 1 else contextlib.nullcontext

    def of_replica(batch: Any) -> Any:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        for variable in gathered:
            variable.assign(tf.zeros_like(variable.value))
        with apart():
            model(x, training=False)
        return tf.concat([tf.reshape(variable.value, (-1,)) for variable in gathered], axis=0)

    def of_all(iterator: Any) -> Any:
        results = strategy.run(of_replica, args=(next(iterator),))
        return strategy.experimental_local_results(results)[0]

    if getattr(model, "run_eagerly", False):
        return of_all
    return tf.function(of_all, autograph=False, reduce_retracing=True)
