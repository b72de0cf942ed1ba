"""The global batches that both runs are given."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import keras
import numpy as np
from keras import tree

from syncbn.errors import InputError

__all__ = ["Batches", "load_file", "make_batches"]

DEFAULT_SIZE = 32
_NAMES = {
    "x": ("x", "x_train", "inputs"),
    "y": ("y", "y_train", "targets", "labels"),
    "sample_weight": ("sample_weight", "weights"),
}


class Batches(NamedTuple):
    """Arrays whose rows are examples, and how many of them make a step.

    Attributes:
        x: an array, or a structure of arrays.
        y: likewise, or None.
        sample_weight: likewise, or None.
        size: examples of a global batch; the last may be smaller.
    """

    x: Any
    y: Any
    sample_weight: Any
    size: int

    @property
    def examples(self) -> int:
        """Of all batches."""
        return len(tree.flatten(self.x)[0])

    @property
    def steps(self) -> int:
        """How many batches there are."""
        return len(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Examples of each batch."""
        return [
            min(self.size, self.examples - start) for start in range(0, self.examples, self.size)
        ]

    def rows(self, which: Any) -> tuple[Any, Any, Any]:
        """Some of the examples."""
        return tuple(  # type: ignore[return-value]
            None if part is None else tree.map_structure(lambda array: array[which], part)
            for part in (self.x, self.y, self.sample_weight)
        )

    def shuffled(self, seed: int) -> Batches:
        """The same examples in each batch, in another order."""
        random = np.random.default_rng(seed)
        edges = np.cumsum([0, *self.sizes])
        order = [
            random.permutation(np.arange(start, stop)) for start, stop in itertools.pairwise(edges)
        ]
        return Batches(*self.rows(np.concatenate(order)), self.size)

    def check_fits(self, model: Any) -> None:
        """Raise an InputError where the inputs cannot be those of the model."""
        expected = getattr(model, "inputs", None)
        if not expected:
            return
        given = tree.flatten(self.x)
        if len(given) != len(expected):
            raise InputError(
                f"The model {model.name!r} requires {len(expected)} input(s). Received: data with "
                f"{len(given)}. Give x as the list or the dictionary that `fit` takes."
            )
        if isinstance(self.x, dict):
            return  # by name, which Keras does
        for tensor, array in zip(expected, given, strict=True):
            shape = tuple(tensor.shape)
            fits = len(shape) == array.ndim and all(
                wanted in {None, there}
                for wanted, there in zip(shape[1:], array.shape[1:], strict=True)
            )
            # Keras itself adds or drops a last axis of 1.
            if (
                not fits
                and (*array.shape[1:], 1) != shape[1:]
                and array.shape[1:] != (*shape[1:], 1)
            ):
                raise InputError(
                    f"The model {model.name!r} requires inputs of shape {shape}. Received: data "
                    f"with examples of shape {array.shape[1:]}. Check the data, or the model's "
                    "Input."
                )


def load_file(path: str | Path) -> tuple[Any, Any, Any]:
    """x, y and sample_weight of an .npz file, under these names or `x_train`, `y_train`.

    Raises:
        InputError: it cannot be read, or has no x.
    """
    try:
        # Opened here: NumPy leaves a file open that is no archive.
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, EOFError, TypeError, BadZipFile) as error:
        raise InputError(
            f"Data to verify with require an .npz file of arrays. Received: {str(path)!r} "
            f"({error}). Write one: numpy.savez(path, x=x, y=y)."
        ) from error
    found = [
        next((arrays[name] for name in names if name in arrays), None) for names in _NAMES.values()
    ]
    if found[0] is None:
        raise InputError(
            "Data to verify with require an array x (or x_train), and y for most losses. Received: "
            f"{str(path)!r} with {', '.join(arrays) or 'nothing'}. Write one: "
            "numpy.savez(path, x=x, y=y)."
        )
    return found[0], found[1], found[2]


def make_batches(data: Any, replicas: int, steps: int, size: int | None) -> Batches:
    """The batches of a verification: the first of an epoch, and its last.

    The last batch of an epoch has what is left; it is the one that trainings get wrong.

    Raises:
        InputError: data that are none, or too few.
    """
    if isinstance(data, str | Path):
        data = load_file(data)
    elif not isinstance(data, tuple):
        data = (data,)
    x, y, sample_weight = _three(data)
    examples = _length(x, y, sample_weight)
    size = min(DEFAULT_SIZE, examples) if size is None else size
    if size < 1:
        raise InputError(
            f"A global batch requires at least one example. Received: batch_size={size}. Give how "
            "many examples all replicas take together in a step."
        )
    if min(size, examples) < replicas:
        raise InputError(
            f"{replicas} replicas require at least as many examples in a global batch. Received: "
            f"{min(size, examples)}. Take fewer replicas, or more examples."
        )
    whole = Batches(x, y, sample_weight, size)
    if steps >= whole.steps:
        return whole
    left = examples % size or size
    start = (steps - 1) * size
    taken = np.r_[0:start, examples - left : examples]
    return Batches(*whole.rows(taken), size)


def _three(data: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    x, y, sample_weight = (*data, None, None, None)[:3] if len(data) <= 3 else (None, None, None)
    if x is None or not tree.flatten(x):
        raise InputError(
            "Data to verify with require arrays: x, (x, y) or (x, y, sample_weight), or the path "
            f"of an .npz file. Received: {type(data[0]).__name__ if data else 'nothing'}"
            f"{f', {len(data)} of them' if len(data) > 3 else ''}. Take some batches of your data "
            "set as arrays."
        )
    arrays: list[Any] = []
    for part in (x, y, sample_weight):
        try:
            arrays.append(None if part is None else tree.map_structure(_as_array, part))
        except (TypeError, ValueError) as error:
            raise InputError(
                "Data to verify with require arrays of numbers. Received: "
                f"{type(part).__module__}.{type(part).__qualname__} ({error}). Take some batches "
                "of your data set as arrays."
            ) from error
    return arrays[0], arrays[1], arrays[2]


def _as_array(value: Any) -> Any:
    array = np.asarray(keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else value)
    if array.dtype == object or array.ndim == 0:
        raise TypeError("no array whose rows are examples")
    return array


def _length(*parts: Any) -> int:
    lengths = {len(array) for part in parts if part is not None for array in tree.flatten(part)}
    if len(lengths) != 1 or 0 in lengths:
        raise InputError(
            "Data to verify with require arrays with one row for each example, at least one. "
            f"Received: arrays of {' and '.join(map(str, sorted(lengths)))} rows."
        )
    return lengths.pop()
