"""A model loaded from an `.h5` file can be trained on, with the state of its optimizer.

Keras builds the optimizer for `model._trainable_variables`, which leaves out all that belong to
layers: the state in the file is dropped, and the first step fails with "Unknown variable". It does
so on one device too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from keras.src import optimizers
from keras.src.legacy.saving import saving_utils

from syncbn.multi_worker.repair import Patch, source_probe

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras builds the optimizer for the model's own variables alone."""
    return source_probe(
        "keras.src.legacy.saving.legacy_h5_format.load_model_from_hdf5",
        broken="model.optimizer.build(model._trainable_variables)",
        mended="model.optimizer.build(model.trainable_variables)",
    )


def patches() -> list[Patch]:
    """What comes before; an optimizer that is built already is not built again."""
    return [Patch(saving_utils, "try_build_compiled_arguments", _builder)]


def _builder(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def try_build_compiled_arguments(model: Any) -> None:
        original(model)
        if model.built and isinstance(model.optimizer, optimizers.Optimizer):
            model.optimizer.build(model.trainable_variables)

    return try_build_compiled_arguments
