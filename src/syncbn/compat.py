"""The old name, `keras.layers.experimental.SyncBatchNormalization`, for code that still says it.

TensorFlow 2.2 to 2.15 had the layer there; Keras 3 raises an AttributeError. `install()` puts
syncbn's in its place, until `uninstall()`, and lets `keras.models.load_model` make it from old
files that name the class. Nothing is changed unless it is called.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from types import ModuleType, TracebackType
from typing import Any, Self

import keras

from syncbn.errors import RepairError
from syncbn.layer import SyncBatchNormalization

__all__ = ["Installed", "install", "uninstall"]

_NAME = "SyncBatchNormalization"
# Where Keras 3 has `layers`: its own, and what `tf.keras` is since TensorFlow 2.16.
_LAYERS = ("keras.layers", "keras._tf_keras.keras.layers")
# What `tf.keras.layers` becomes once anybody writes `from tensorflow.keras.layers import …`: the
# same file as a module of its own. So it is imported here: later it would come without the name.
_OF_TENSORFLOW = "tensorflow.keras.layers"
_MISSING = object()


class Installed:
    """The old name is there; a context manager whose end takes it away, as `uninstall()` does.

    Leaving it leaves the name where it was there before it was entered.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self._custom_before: Any = _MISSING

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _lock:
            self._calls -= 1
            if self._calls <= 0 and _active is self:
                uninstall()

    def _apply(self) -> None:
        names = [*_LAYERS, *([_OF_TENSORFLOW] if _tensorflow_has_keras_3() else [])]
        places = [importlib.import_module(name) for name in names]
        taken = [place.__name__ for place in places if _conflict(place)]
        objects = keras.saving.get_custom_objects()
        if objects.get(_NAME, SyncBatchNormalization) is not SyncBatchNormalization:
            taken.append("keras.saving.get_custom_objects()")
        if taken:
            raise RepairError(
                f"compat.install() requires that the name {_NAME} is free or syncbn's. Received: "
                f"another object of this name in {', '.join(taken)}. Remove that one first."
            )
        for place in places:
            module = getattr(place, "experimental", None)
            if module is None:
                module = ModuleType(f"{place.__name__}.experimental", __doc__)
                self._set(place.__dict__, "experimental", module)
            self._set(module.__dict__, _NAME, SyncBatchNormalization)
            self._set(sys.modules, f"{place.__name__}.experimental", module)
        self._set(objects, _NAME, SyncBatchNormalization)

    def _set(self, place: Any, name: str, value: Any) -> None:
        before = place.get(name, _MISSING)
        if before is not value:
            self._undo.append((place, name, before, value))
            place[name] = value

    def _revert(self) -> None:
        for place, name, before, value in reversed(self._undo):
            if place.get(name, _MISSING) is not value:
                continue  # somebody has put another there since: it is theirs
            if before is _MISSING:
                del place[name]
            else:
                place[name] = before
        self._undo.clear()


def _tensorflow_has_keras_3() -> bool:
    """Whether TensorFlow is in use, and its Keras is this one: else there is nothing to give back.

    Keras on JAX or torch does not import it, and neither do we.
    """
    legacy = os.environ.get("TF_USE_LEGACY_KERAS") in ("true", "True", "1")
    return "tensorflow" in sys.modules and not legacy


def _conflict(layers: Any) -> bool:
    experimental = getattr(layers, "experimental", None)
    there = getattr(experimental, _NAME, SyncBatchNormalization)
    return there is not SyncBatchNormalization


_active: Installed | None = None
_lock = threading.RLock()


def install() -> Installed:
    """Give `keras.layers.experimental.SyncBatchNormalization` back: it is syncbn's layer.

    Also as `tf.keras.layers.experimental.SyncBatchNormalization`, where TensorFlow's Keras is Keras
    3, and for imports of these names. Its arguments are those of the old layer, but `adjustment` of
    TensorFlow 2.4 and before, which is refused. With TF_USE_LEGACY_KERAS=1, `tf.keras` is tf_keras,
    which has its own old layer, and is left alone. Calling it again gives the same object.

    Returns:
        A context manager; leaving it takes the name away, unless it was there before.

    Raises:
        RepairError: another object has this name; it stays, and nothing is changed.

    References:
        TensorFlow 2.2 to 2.15, `tf.keras.layers.experimental.SyncBatchNormalization`.

    Examples:
        >>> from syncbn import compat
        >>> with compat.install():
        ...     layer = keras.layers.experimental.SyncBatchNormalization()
    """
    global _active
    with _lock:
        if _active is None:
            installed = Installed()
            installed._apply()
            _active = installed
        _active._calls += 1
        return _active


def uninstall() -> None:
    """Take the old name away again, wherever `install()` put it. Doing it twice does nothing."""
    global _active
    with _lock:
        if _active is not None:
            _active._revert()
            _active._calls = 0
            _active = None
