"""Images with labels: handwritten digits, MNIST, or a file in the layout of Keras's MNIST."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from syncbn.errors import InputError

__all__ = ["Dataset", "load"]

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_LAYOUT = (
    "an .npz file with the arrays x_train (N, H, W) or (N, H, W, channels), y_train (N,), "
    "x_test and y_test, as np.savez writes it"
)


class Dataset(NamedTuple):
    """Images scaled to about 0..1 and their classes."""

    name: str
    x_train: np.ndarray[Any, np.dtype[np.float32]]  # shape (N, H, W, channels)
    y_train: np.ndarray[Any, np.dtype[np.int32]]  # shape (N,), 0 ≤ y < classes
    x_test: np.ndarray[Any, np.dtype[np.float32]]  # shape (M, H, W, channels)
    y_test: np.ndarray[Any, np.dtype[np.int32]]  # shape (M,)
    classes: int


def load(source: str) -> Dataset:
    """The data of that name ("digits", "mnist") or in that file.

    Raises:
        InputError: the data cannot be had, or are not images with labels.
    """
    if source == "digits":
        return _checked("digits", _digits())
    if source == "mnist":
        return _checked("mnist", _mnist())
    return _checked(Path(source).name, _read_npz(Path(source)))


def _digits() -> dict[str, Any]:
    """The 1797 real digits of 8×8 pixels that scikit-learn carries; every fifth is for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "--data digits requires scikit-learn, which carries the digits. Received: no such "
            "package. Install it: pip install 'syncbn[train]'."
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[::5], np.setdiff1d(order, order[::5])
    return {
        "x_train": images[train],
        "y_train": labels[train],
        "x_test": images[test],
        "y_test": labels[test],
    }


def _mnist() -> dict[str, Any]:
    import keras

    try:
        (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises Exception itself when a download fails
        raise InputError(
            "--data mnist requires a network, to fetch MNIST once, or a copy in Keras's cache "
            f"(~/.keras/datasets/mnist.npz). Received: {_first_line(error)}. Without a network "
            "give a file (--data mnist.npz) or use --data digits."
        ) from error
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _read_npz(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"--data requires digits, mnist, or {_LAYOUT}. Received: {str(path)!r}, which is not "
            "a file. Check the path."
        )
    try:
        with path.open("rb") as stream:  # np.load would leave a broken file open
            loaded = np.load(stream, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise InputError(
                    f"--data requires {_LAYOUT}. Received: {str(path)!r}, a single array (.npy). "
                    "Save the four arrays with np.savez."
                )
            with loaded:
                return _four_arrays(path, loaded)
    # RuntimeError: encrypted, or packed by an unknown method. MemoryError: an absurd shape.
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--data requires {_LAYOUT}. Received: {str(path)!r}, which cannot be read as one "
            f"({_first_line(error)}). Make the file again."
        ) from error


def _four_arrays(path: Path, loaded: Any) -> dict[str, Any]:
    missing = [name for name in _ARRAYS if name not in loaded.files]
    if missing:
        raise InputError(
            f"--data requires {_LAYOUT}. Received: {str(path)!r} with the arrays "
            f"{sorted(loaded.files)}. Add or rename: {', '.join(missing)}."
        )
    arrays = {name: loaded[name] for name in _ARRAYS}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is not an array")
    return arrays


def _checked(name: str, arrays: dict[str, Any]) -> Dataset:
    for part in ("train", "test"):
        _check_images(name, f"x_{part}", arrays[f"x_{part}"])
        _check_labels(name, f"y_{part}", arrays[f"y_{part}"], len(arrays[f"x_{part}"]))
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise InputError(
            f"{name}: training and test images must be of one size. Received: x_train "
            f"{arrays['x_train'].shape} and x_test {arrays['x_test'].shape}. Resize one of them."
        )
    kinds = {arrays[f"x_{part}"].dtype.kind in "ui" for part in ("train", "test")}
    if len(kinds) > 1:
        raise InputError(
            f"{name}: training and test images must both be integers or both be floats, to be "
            f"scaled alike. Received: {arrays['x_train'].dtype} and {arrays['x_test'].dtype}. "
            "Save them in one dtype."
        )
    classes = _count_classes(name, arrays["y_train"], arrays["y_test"])
    integer = np.issubdtype(arrays["x_train"].dtype, np.integer)
    scale = max(float(arrays["x_train"].max()), 1.0) if integer else 1.0
    return Dataset(
        name=name,
        x_train=_as_images(arrays["x_train"], scale),
        y_train=arrays["y_train"].astype(np.int32),
        x_test=_as_images(arrays["x_test"], scale),
        y_test=arrays["y_test"].astype(np.int32),
        classes=classes,
    )


def _as_images(images: Any, scale: float) -> Any:
    images = (images / scale).astype(np.float32)
    return images[..., None] if images.ndim == 3 else images


def _check_images(name: str, array_name: str, images: Any) -> None:
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise InputError(
            f"{name}: {array_name} must hold images, of shape (N, H, W) or (N, H, W, channels), "
            f"none of them 0. Received: shape {images.shape}. Reshape the array."
        )
    if images.dtype.kind not in "uif":
        raise InputError(
            f"{name}: {array_name} must hold numbers. Received: dtype {images.dtype}. Save it as "
            "uint8 or float32."
        )
    # Compared, not cast: a float64 of 1e300 would become an infinity in float32.
    bad = ~(np.abs(images) <= np.finfo(np.float32).max) if images.dtype.kind == "f" else False
    if np.any(bad):
        raise InputError(
            f"{name}: {array_name} must hold numbers that are finite in float32. Received: "
            f"{int(np.sum(bad))} NaN, infinite or larger values. Remove those images."
        )


def _check_labels(name: str, array_name: str, labels: Any, images: int) -> None:
    if labels.shape != (images,) or labels.dtype.kind not in "ui":
        raise InputError(
            f"{name}: {array_name} must hold one integer an image, shape ({images},). Received: "
            f"shape {labels.shape}, dtype {labels.dtype}. Save class numbers, not one-hot rows."
        )


def _count_classes(name: str, train: Any, test: Any) -> int:
    present = np.unique(train)
    classes = len(present)
    if classes < 2 or present[0] != 0 or present[-1] != classes - 1:
        raise InputError(
            f"{name}: y_train must number its classes 0, 1, … without a gap, at least two of them. "
            f"Received: {classes} distinct label(s) from {present[0]} to {present[-1]}, out of "
            f"range for {classes}. Renumber the labels."
        )
    if test.min() < 0 or test.max() >= classes:
        raise InputError(
            f"{name}: y_test must hold classes of y_train, 0 to {classes - 1}. Received: labels "
            f"from {test.min()} to {test.max()}, out of range. Correct or remove those images."
        )
    return classes


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
