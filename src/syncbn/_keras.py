"""What syncbn needs of Keras beyond its public names, and how Keras's versions differ in it."""

from __future__ import annotations

import collections
import contextlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
from keras import ops

from syncbn.errors import UnsupportedFeatureError

__all__ = [
    "aggregates_assignments",
    "casts_arrays_unasked",
    "counter_dtype",
    "data_adapter",
    "excludes_from_autocast",
    "in_symbolic_scope",
    "knows_renorm",
    "names_from_the_start",
    "without_autocast",
    "xp",
]


def _maximum(tensor: Any, other: Any) -> Any:
    other = ops.convert_to_tensor(other, tensor.dtype)
    return ops.where(tensor < other, other, tensor)  # of a NaN it is NaN


def _minimum(tensor: Any, other: Any) -> Any:
    other = ops.convert_to_tensor(other, tensor.dtype)
    return ops.where(tensor > other, other, tensor)


# keras.ops as the pure maths calls it. By Keras's promotion `ops.maximum` of float64 is float32 on
# every backend but TensorFlow.
xp = SimpleNamespace(
    maximum=_maximum, minimum=_minimum, sqrt=ops.sqrt, where=ops.where, zeros_like=ops.zeros_like
)


def aggregates_assignments() -> bool:
    """Whether `add_weight(aggregation=…)` reaches TensorFlow's variable: it does since Keras 3.7.

    Before, Keras takes the argument, but neither "none" nor any effect of the others.
    """
    return hasattr(keras.Variable, "_map_aggregation")


_KNOWN: dict[str, bool] = {}


def casts_arrays_unasked() -> bool:
    """Whether Keras casts the NumPy arrays among a call's arguments also with `autocast=False`.

    Keras 3.0 does, to the layer's `input_dtype`.
    """
    # Not functools.cache: torch.compile looks behind it, and fails there.
    if "casts_arrays_unasked" not in _KNOWN:
        converted = keras.DTypePolicy("mixed_float16").convert_input(
            np.zeros((), "float32"), autocast=False, dtype="float16"
        )
        dtype = keras.backend.standardize_dtype(converted.dtype)
        _KNOWN["casts_arrays_unasked"] = dtype == "float16"
    return _KNOWN["casts_arrays_unasked"]


def counter_dtype() -> str:
    """The dtype of a variable that counts; a float32 stops at 16.7 million.

    JAX has no int64 unless it is asked for one, and warns of each.
    """
    return "int32" if keras.backend.backend() == "jax" else "int64"


def data_adapter(**data: Any) -> Any:
    """What Keras's trainers take the batches of arrays, data sets and generators from.

    Raises:
        UnsupportedFeatureError: this Keras takes no adapter but those that it makes itself.
    """
    from keras.src.trainers import data_adapters

    if not hasattr(data_adapters, "get_data_adapter"):
        raise UnsupportedFeatureError(
            "Distributed data sets require a Keras whose fit takes a data adapter. Received: "
            f"Keras {keras.__version__}. Install Keras 3.8 or later."
        )
    return data_adapters.get_data_adapter(**data)


def excludes_from_autocast() -> bool:
    """Whether `add_weight(autocast=…)` is an argument: Keras 3.0 does not have it."""
    return "autocast" in inspect.signature(keras.layers.Layer.add_weight).parameters


def in_symbolic_scope() -> bool:
    """Whether Keras only computes shapes now, as while it builds a model from its inputs.

    Keras exports the scope (`keras.SymbolicScope`) but not the question.
    """
    try:
        from keras.src.backend.common.symbolic_scope import in_symbolic_scope as keras_answer
    except ImportError:  # Keras before 3.5
        from syncbn._backends.tensorflow.graphs import in_shape_inference as keras_answer
    return bool(keras_answer())


def knows_renorm() -> bool:
    """Whether Keras's BatchNormalization renormalizes: it does since 3.13."""
    return "renorm" in inspect.signature(keras.layers.BatchNormalization.__init__).parameters


@contextlib.contextmanager
def names_from_the_start() -> Iterator[None]:
    """Meanwhile Keras counts names such as `dense_3` anew, so that two builds have the same."""
    from keras.src.backend.common import global_state

    key = "object_name_uids"
    before = global_state.get_global_attribute(key)
    global_state.set_global_attribute(key, collections.defaultdict(int))
    try:
        yield
    finally:
        global_state.set_global_attribute(key, before)


def without_autocast() -> Any:
    """A scope where a variable is read as it is stored, not in the dtype of the computation.

    Keras 3.2 and later does so for the weights of a batch normalization without being asked.
    """
    from keras.src.backend import AutocastScope

    return AutocastScope(None)
