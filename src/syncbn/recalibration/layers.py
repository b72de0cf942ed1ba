"""Which layers are recalibrated, and what they do while they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from syncbn._backends.interface import Scheme
from syncbn._keras import xp
from syncbn.conversion.arguments import TO_SYNCHRONIZED, arguments_of
from syncbn.conversion.in_place import specialize, switch
from syncbn.conversion.plan import Replacement, batch_normalizations
from syncbn.layer import SyncBatchNormalization
from syncbn.moments import Moments, merge

__all__ = ["Found", "NotRecalibrated", "find", "moments_of", "recalibrating"]

_PLAIN = keras.layers.BatchNormalization


class Found(NamedTuple):
    """A layer to recalibrate."""

    path: str
    layer: Any


class NotRecalibrated(NamedTuple):
    """A batch normalization that keeps the moving statistics that it has."""

    path: str
    layer_class: str
    reason: str


def find(model: Any) -> tuple[list[Found], list[NotRecalibrated]]:
    """The batch normalizations of a model: those to recalibrate, and the others with the reason."""
    found, left = [], []
    for path, layer in batch_normalizations(model):
        reason = _reason_to_leave(layer)
        if reason:
            left.append(NotRecalibrated(path, type(layer).__name__, reason))
        else:
            found.append(Found(path, layer))
    return found, left


def _reason_to_leave(layer: Any) -> str:
    if type(layer) not in (_PLAIN, SyncBatchNormalization):
        return f"{type(layer).__name__} is a class of its own"
    if not layer.trainable:
        return "it is frozen, trainable=False"
    if not layer.built:
        return "it has never been called"
    return ""


@contextlib.contextmanager
def recalibrating(found: Sequence[Found], dtype: str, scope: Any) -> Iterator[list[Any]]:
    """The layers normalize by their batches for the length of a block, and gather the moments.

    Args:
        found: of one model.
        dtype: of the moments that they gather.
        scope: makes the context in which variables are made.

    Yields:
        A variable of shape (3, C) for each layer: count, mean and M2 of the elements that it has
        normalized since the variable was 0.
    """
    plain = [one for one in found if type(one.layer) is _PLAIN]
    with contextlib.ExitStack() as undo:
        with scope():
            gathered = [_zeros(one.layer.moving_mean.shape[0], dtype) for one in found]
        undo.enter_context(switch(tuple(map(_replacement, plain))))
        undo.enter_context(specialize((one.layer for one in found), _Recalibrating))
        for one, variable in zip(found, gathered, strict=True):
            # Past Keras, which would take it for one of the layer's own weights.
            vars(one.layer)["gathered"] = variable
        yield gathered


def _zeros(channels: int, dtype: str) -> Any:
    return keras.Variable(np.zeros((3, channels)), dtype=dtype, trainable=False)


def _replacement(one: Found) -> Replacement:
    arguments, _ = arguments_of(one.layer, TO_SYNCHRONIZED, {})
    made = SyncBatchNormalization(**arguments)
    return Replacement(one.path, _PLAIN.__name__, type(made).__name__, {}, {}, one.layer, made)


class _Recalibrating(SyncBatchNormalization):
    """Normalizes as in training, also in inference, and gathers moments in place of moving any."""

    def call(
        self,
        inputs: Any,
        training: bool | None = None,  # noqa: ARG002 - the rest of the model is in inference
        mask: Any | None = None,
        weights: Any | None = None,
    ) -> Any:
        return super().call(inputs, training=True, mask=mask, weights=weights)

    def _follow(self, union: Moments) -> None:
        dtype = union.mean.dtype
        before = ops.cast(self.gathered, dtype)
        channels = before.shape[1:]
        batch = Moments(*(ops.broadcast_to(ops.cast(v, dtype), channels) for v in union))
        gathered = merge(Moments(before[0], before[1], before[2]), batch, xp)
        self.gathered.assign(ops.stack(gathered))

    def _scheme(self) -> Scheme:
        # No gradient is taken, NaN is looked for once a step for all layers, and the batch is whole
        # where JAX maps over none of its axes.
        return super()._scheme()._replace(checked_layer=None, kept_output=None, axis_name=None)


def moments_of(found: Sequence[Found], vector: Any) -> list[Moments]:
    """The moments of each layer in a step, in float64, of all variables in one vector."""
    sizes = [3 * one.layer.moving_mean.shape[0] for one in found]
    parts = np.split(np.asarray(vector, np.float64), np.cumsum(sizes)[:-1])
    return [Moments(*part.reshape(3, -1)) for part in parts]
