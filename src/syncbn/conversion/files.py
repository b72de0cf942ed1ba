"""Models in files: opened without running what is in them, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from syncbn.errors import InputError
from syncbn.files import written_whole
from syncbn.layer import SyncBatchNormalization

__all__ = ["checked_output", "opened", "write"]

SUFFIXES = (".keras", ".h5")


def opened(path: Path, *, unsafe: bool = False, with_training: bool = True) -> Any:
    """The model of a `.keras` or `.h5` file, also with the layer's old name in Keras 2.

    Args:
        path: the file.
        unsafe: run the code that a file may hold (a Lambda layer's).
        with_training: with its loss, metrics and optimizer.

    Raises:
        InputError: it is no such file; code in it; a class that Keras does not know.
    """
    what = _checked_file(path)
    code = [] if unsafe else list(_code_in(_config(path)))
    if code:
        raise InputError(
            f"Conversion requires a file without code of its own. Received: {path} with {code[0]}. "
            "Pass --unsafe if you trust whoever made it."
        )
    try:
        with _without_warnings():
            return keras.saving.load_model(
                path,
                custom_objects={"SyncBatchNormalization": SyncBatchNormalization},
                compile=with_training,
                safe_mode=not unsafe,
            )
    except (TypeError, ValueError, KeyError, OSError, AttributeError, ImportError) as error:
        raise InputError(
            f"Conversion requires {what} that Keras {keras.__version__} can open by itself. "
            f"Received: {path}, of which Keras says: {_first_line(error)}. Where it needs classes "
            "of your own, convert in Python: syncbn.convert(keras.saving.load_model(…)); where the "
            "loss or the optimizer stands against it, pass --without-training."
        ) from error


def checked_output(path: Path, force: bool) -> None:
    """Make sure that a model can be written there.

    Raises:
        InputError: another suffix, no such folder, or a file that is not to be replaced.
    """
    if path.suffix not in SUFFIXES or path.name.endswith(".weights.h5"):
        raise InputError(
            f"OUT requires a name that ends in {' or '.join(SUFFIXES)}. Received: {path}. The "
            "first is Keras 3's own."
        )
    if not path.parent.is_dir():
        raise InputError(f"OUT requires a folder that is there. Received: {path}. Make it.")
    if path.is_dir():
        raise InputError(f"OUT requires a file. Received: the folder {path}. Name a file in it.")
    if path.exists() and not force:
        raise InputError(
            f"OUT requires a name that is free. Received: {path}, a file that is there. Choose "
            "another name, or pass --force to replace it."
        )


def write(model: Any, path: Path) -> None:
    """Write the model, look whether the file gives it back, and only then put it in its place.

    Raises:
        InputError: it cannot be written; the file does not give back the model, because a layer of
            its own makes the layers that were converted.
    """
    try:
        with written_whole(path) as temporary:
            with _without_warnings():
                model.save(temporary)
            if _bits(opened(temporary, unsafe=True, with_training=False)) != _bits(model):
                raise InputError(
                    "Conversion requires a model that its file gives back. Received: "
                    f"{model.name!r}, of which it does not. Convert in Python, after the model is "
                    "made."
                )
    except OSError as error:
        raise InputError(
            f"OUT requires a file that can be written. Received: {path}: {error}. Nothing was "
            "changed; make room, or name another place."
        ) from error


def _bits(model: Any) -> list[bytes]:
    return [keras.ops.convert_to_numpy(weight).tobytes() for weight in model.weights]


def _checked_file(path: Path) -> str:
    """What the file is, if it is one of the two kinds."""
    if not path.is_file():
        raise InputError(
            f"IN requires a file. Received: {path}, which is not there or is a folder. Keras 3 "
            "cannot change a SavedModel; convert the file of the model it was made from."
        )
    if path.suffix not in SUFFIXES or path.name.endswith(".weights.h5"):
        raise InputError(
            f"IN requires a whole model in a {' or '.join(SUFFIXES)} file. Received: {path}. "
            "For weights alone make the model in Python, and take syncbn.load_weights."
        )
    return f"a {path.suffix} file"


def _config(path: Path) -> Any:
    """The configuration in a file; nothing of a file that Keras will have to refuse."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if "config.json" in archive.namelist():
                return json.loads(archive.read("config.json"))
        return None
    import h5py

    if not h5py.is_hdf5(path):
        return None
    with h5py.File(path) as file:
        return json.loads(file.attrs.get("model_config", "null"))


# Whose classes a file may name without anything being imported that is not there already.
_KNOWN_MODULES = ("builtins", "keras", "syncbn", "tf_keras")


def _code_in(config: Any) -> Iterator[str]:
    """What Keras would run of a configuration, whatever its own safe mode looks for.

    That did not look into `.h5` files before Keras 3.11, nor at modules before 3.9.
    """
    if isinstance(config, dict):
        if config.get("class_name") == "__lambda__" or config.get("function_type") == "lambda":
            yield "the function of a Lambda layer, which Keras would run"
        module = config.get("module")
        if isinstance(module, str) and module.split(".")[0] not in _KNOWN_MODULES:
            yield f"the module {module!r}, which Keras would import"
        for value in config.values():
            yield from _code_in(value)
    elif isinstance(config, list):
        for value in config:
            yield from _code_in(value)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Without Keras's advice on formats, which was asked for by its suffix."""
    import logging
    import warnings

    level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("absl").setLevel(level)
