"""Making a layer another in place, all of them or none.

The layer stays the object it is, with its variables, its place in lists, wrappers and graphs, and
its slots in the optimizer; its class and arguments change. Building a second model instead would
have to find each of these again, which for subclassed models nobody can.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import keras

from syncbn.conversion.arguments import TO_PLAIN, TO_SYNCHRONIZED
from syncbn.conversion.plan import Replacement

__all__ = ["forget_compiled", "specialize", "switch"]

# Values of a layer that its constructor alone decides, so that two can be compared.
_PLAIN = (bool, int, float, str, type(None), tuple, list, dict, set, inspect.Signature)


class _Undo:
    """What a layer was, to be that again."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._class = type(layer)
        self._attributes = dict(vars(layer))
        self._counter = getattr(layer, "num_batches_tracked", None)

    def __call__(self) -> None:
        attributes = vars(self._layer)
        attributes.clear()
        attributes.update(self._attributes)
        object.__setattr__(self._layer, "__class__", self._class)
        known = {id(variable) for variable in self._layer._non_trainable_variables}
        if self._counter is not None and id(self._counter) not in known:
            locked = self._layer._tracker.locked
            self._layer._tracker.unlock()
            self._layer._track_variable(self._counter)
            if locked:
                self._layer._lock_state()


def switch(replacements: tuple[Replacement, ...]) -> contextlib.ExitStack:
    """Make each layer what it is to be; on an error none.

    Returns:
        Whose `close()` makes them what they were.
    """
    return _all_or_none(
        (one.layer, functools.partial(_become, one.layer, one.made)) for one in replacements
    )


def specialize(layers: Iterable[Any], subclass: type) -> contextlib.ExitStack:
    """Make each layer one of a subclass of its own class, with the attributes that it has.

    Returns:
        Whose `close()` makes them what they were, their attributes too.
    """
    return _all_or_none(
        (layer, functools.partial(object.__setattr__, layer, "__class__", subclass))
        for layer in layers
    )


def _all_or_none(changes: Iterable[tuple[Any, Callable[[], None]]]) -> contextlib.ExitStack:
    """Make each change of a layer; on an error all that were made are undone."""
    undo = contextlib.ExitStack()
    try:
        for layer, change in changes:
            undo.callback(_Undo(layer))
            change()
    except BaseException:
        undo.close()
        raise
    return undo


def _become(layer: Any, made: Any) -> None:
    """Give the layer the class and the arguments of one that is not built."""
    before = _made_as(layer)
    attributes, new, old = vars(layer), vars(made), vars(before)
    counter = getattr(layer, "num_batches_tracked", None)
    if counter is not None and getattr(made, "momentum", None) is not None:
        layer._untrack_variable(counter)
        del attributes["num_batches_tracked"]
    object.__setattr__(layer, "__class__", type(made))
    for name in set(old) - set(new):
        attributes.pop(name, None)
    # Of the base class's arguments these stay, and with them what is made of them.
    arguments = inspect.signature(type(made).__init__).parameters
    for name, value in new.items():
        if name == "name":
            continue
        differs = isinstance(value, _PLAIN) and (name in arguments or value != old.get(name))
        if name not in old or differs:
            attributes[name] = value
    _wrap_methods(layer, type(made))


def _made_as(layer: Any) -> Any:
    """A layer of Keras's or our class that is to this one as a new one to a new one."""
    old = TO_SYNCHRONIZED if TO_SYNCHRONIZED.is_of_old_kind(layer) else TO_PLAIN
    return old.old_class(name=layer.name)


def _wrap_methods(layer: Any, its_class: type) -> None:
    """Have Keras wrap `build` and `quantize` of the new class, as it does when a layer is made."""

    class Same:
        def __new__(cls, *_: Any, **__: Any) -> Any:
            return layer

    lock = vars(layer).get("_lock")
    for name in ("build", "quantize"):
        vars(layer).pop(name, None)
    shell = type(its_class.__name__, (its_class, Same), {})
    assert keras.layers.Layer.__new__(shell) is layer
    if lock is not None:
        vars(layer)["_lock"] = lock


def forget_compiled(model: Any) -> None:
    """Have Keras trace the steps of the model, and of models within it, anew."""
    for layer in model._flatten_layers():
        if not isinstance(layer, keras.Model):
            continue
        for name in ("train_function", "test_function", "predict_function"):
            setattr(layer, name, None)
        # "auto" was decided by the old layers.
        if layer.compiled and layer.jit_compile and not _supports_jit(layer):
            layer.jit_compile = False


def _supports_jit(model: Any) -> bool:
    return all(layer.supports_jit for layer in model._flatten_layers())
