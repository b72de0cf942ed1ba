"""The user's own program: the function that makes the model, and the model that it makes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import keras

from syncbn._keras import names_from_the_start
from syncbn.errors import InputError
from syncbn.verification.batches import Batches

__all__ = ["built_model", "load_function", "name_of", "optimizers_of"]

_LOSS_SCALE = 2.0**7
_FORM = "module:function, as train:build_model or train.py:build_model"


def load_function(name: str) -> Callable[[], Any]:
    """The function of `module:function`; a module may be a file.

    Raises:
        InputError: the name has another form, the module does not import, or has no such function.
    """
    module_name, colon, function_name = name.rpartition(":")
    if not (colon and module_name and function_name):
        raise InputError(
            f"A model to verify requires {_FORM}. Received: {name!r}. Name the function that "
            "returns the compiled model."
        )
    module = _imported(module_name)
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        found = sorted(
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        )
        raise InputError(
            f"A model to verify requires {_FORM}. Received: {name!r}, and {module_name} has no "
            f"function of that name. It has: {', '.join(found) or 'none'}."
        )
    return function  # type: ignore[no-any-return]


def _imported(name: str) -> ModuleType:
    # As `python -m` does, which users' modules beside the working directory expect.
    here = str(Path.cwd())
    sys.path[:0] = [] if here in sys.path else [here]
    try:
        if name.endswith(".py"):
            return _from_file(Path(name))
        return importlib.import_module(name)
    except InputError:
        raise
    # SystemExit: a script without `if __name__ == "__main__"`.
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in {
            name.rsplit(".", count)[0] for count in range(name.count(".") + 1)
        }
        remedy = (
            "Start in the folder that it is in, or give the path of the file."
            if missing
            else f"Mend that first: python -c 'import {name}' shows where it comes from."
            if not name.endswith(".py")
            else f"Mend that first: python {name} shows where it comes from."
        )
        raise InputError(
            f"A model to verify requires a module that imports. Received: {name}, which fails with "
            f"{type(error).__name__}: {error}. {remedy}"
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(
            f"A model to verify requires {_FORM}. Received: {str(path)!r}, which is no file. Check "
            "the path."
        )
    # The modules beside it are its own, as when it is run as a script.
    folder = str(path.resolve().parent)
    sys.path[:0] = [] if folder in sys.path else [folder]
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def name_of(function: Callable[[], Any]) -> str:
    """`module:function`, by which another process finds the function.

    Raises:
        InputError: it cannot be found by a name, as a lambda or a function within another.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    qualified = getattr(function, "__qualname__", "")
    place = getattr(module, "__file__", None)
    found: Any = module
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if found is not function or module is None:
        raise InputError(
            "Verification by several processes requires a function that each of them can import. "
            f"Received: {getattr(function, '__qualname__', function)!r}. Move it to the top of a "
            "module, or verify on replicas of one process."
        )
    if module.__name__ == "__main__":
        if place is None:
            raise InputError(
                "Verification by several processes requires a function in a file. Received: one "
                "of an interactive session. Move it into a module."
            )
        return f"{place}:{qualified}"
    return f"{module.__name__}:{qualified}"


def built_model(build_model: Callable[[], Any], batches: Batches) -> Any:
    """The user's model, compiled, with all of its variables and those of its optimizer.

    Raises:
        InputError: the function fails, or returns no compiled model, or the data do not fit it.
    """
    with names_from_the_start():
        return _built_model(build_model, batches)


def _built_model(build_model: Callable[[], Any], batches: Batches) -> Any:
    try:
        model = build_model()
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise InputError(
                "A model to verify requires a function that can be called without arguments. "
                f"Received: {error}. Give one that fills them in."
            ) from error
        raise
    if not isinstance(model, keras.Model):
        raise InputError(
            "A model to verify requires a function that returns a keras.Model. Received: "
            f"{type(model).__module__}.{type(model).__qualname__}. Return the model."
        )
    if not model.compiled:
        raise InputError(
            f"A model to verify requires one that is compiled. Received: {model.name!r} without an "
            "optimizer and a loss. Call model.compile(optimizer, loss, …) in the function."
        )
    batches.check_fits(model)
    if not model.built or not model.weights:
        model(batches.rows(slice(0, 1))[0], training=False)
    if model.optimizer is not None:
        model.optimizer.build(model.trainable_variables)
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        # It starts so high that the first gradients overflow, by which it finds its scale; whether
        # they do may hang on a rounding. A power of 2 changes no digit.
        scale = model.optimizer.dynamic_scale
        scale.assign(keras.ops.minimum(scale.value, _LOSS_SCALE))
    # Callbacks, which look on, are called once an execution.
    model.steps_per_execution = 1
    # What XLA compiles on one device it refuses on replicas, and it cannot be looked into.
    if keras.backend.backend() == "tensorflow":
        model.jit_compile = False
    model.train_function = None
    return model


def optimizers_of(model: Any) -> list[Any]:
    """The model's own optimizer, then others that it holds, as one that trains against another."""
    held = [model.optimizer, *vars(model).values()]
    found = [value for value in held if isinstance(value, keras.optimizers.Optimizer)]
    return list({id(one): one for one in found}.values())
