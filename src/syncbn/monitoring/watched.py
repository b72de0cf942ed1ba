"""Which layers are watched, and how they tell what they see."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import keras

from syncbn._backends.interface import Scheme
from syncbn.conversion.plan import batch_normalizations
from syncbn.layer import SyncBatchNormalization
from syncbn.moments import Moments
from syncbn.weighting import element_weights

__all__ = ["NotWatched", "Switch", "Watched", "find"]

_PLAIN = keras.layers.BatchNormalization


class Watched(NamedTuple):
    """A layer that is watched."""

    path: str
    layer: Any


class NotWatched(NamedTuple):
    """A batch normalization that is not, and why."""

    path: str
    layer_class: str
    reason: str


def find(model: Any) -> tuple[list[Watched], list[NotWatched]]:
    """The batch normalizations of a model: those to watch, and the others with the reason."""
    found, left = [], []
    for path, layer in batch_normalizations(model):
        reason = ""
        if not layer.trainable:
            reason = "it is frozen, trainable=False: it normalizes by its moving statistics"
        elif not layer.built:
            reason = "it has never been called"
        elif not _takes_moments_where_expected(layer):
            reason = f"{type(layer).__name__} takes its statistics in a way of its own"
        if reason:
            left.append(NotWatched(path, type(layer).__name__, reason))
        else:
            found.append(Watched(path, layer))
    return found, left


def _takes_moments_where_expected(layer: Any) -> bool:
    return isinstance(layer, SyncBatchNormalization) or hasattr(layer, "_moments")


class Listener(Protocol):
    """Whom the layers tell: the watch of a backend."""

    def saw_moments(self, layer: Any, moments: Moments) -> None:
        """The moments of this replica's part."""

    def saw_inputs(
        self, layer: Any, inputs: Any, axis: int, weights: Any, normalizing: Any
    ) -> None:
        """The inputs, their weights or None, and mean and variance that normalize them or None."""


class Switch:
    """Makes layers tell what they see for the length of a block, and plain layers again after it.

    Only their class changes, to a subclass of itself. Blocks may overlap, as those of the replicas
    do whose steps TensorFlow traces in threads that wait for one another.
    """

    def __init__(self, layers: Sequence[Any], listener: Listener) -> None:
        classes = {type(layer) for layer in layers}
        self._changes = [(layer, type(layer)) for layer in layers]
        self._telling = {one: _telling_class(one, listener) for one in classes}
        self._inside = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The block."""
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                for layer, plain in self._changes:
                    object.__setattr__(layer, "__class__", self._telling[plain])
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for layer, plain in self._changes:
                        object.__setattr__(layer, "__class__", plain)


def _telling_class(plain: type, listener: Listener) -> type:
    own = issubclass(plain, SyncBatchNormalization)
    methods = _methods_of_ours(plain, listener) if own else _methods_of_keras(plain, listener)
    return type(plain.__name__, (plain,), {**methods, "__module__": plain.__module__})


def _methods_of_ours(plain: Any, listener: Listener) -> dict[str, Callable[..., Any]]:
    def _normalize_and_move(layer: Any, inputs: Any, axis: int, mask: Any, weights: Any) -> Any:
        counted = element_weights(inputs, axis, mask, weights)
        listener.saw_inputs(layer, inputs, axis, counted, None)
        return plain._normalize_and_move(layer, inputs, axis, mask, weights)

    def _scheme(layer: Any) -> Scheme:
        scheme: Scheme = plain._scheme(layer)
        return scheme._replace(watch=functools.partial(listener.saw_moments, layer))

    return {"_normalize_and_move": _normalize_and_move, "_scheme": _scheme}


def _methods_of_keras(plain: Any, listener: Listener) -> dict[str, Callable[..., Any]]:
    def _moments(layer: Any, inputs: Any, mask: Any) -> Any:
        normalizing = plain._moments(layer, inputs, mask)
        weights = element_weights(inputs, layer.axis, mask, None)
        listener.saw_inputs(layer, inputs, layer.axis, weights, normalizing)
        return normalizing

    return {"_moments": _moments}
