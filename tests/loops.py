"""A few steps of a backend's training loop, as `syncbn train` takes them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from syncbn import _backends
from syncbn.training import models


def examples(infinite: int | None = None) -> tuple[Any, Any]:
    """37 images in two classes, which are 3 batches of 12 and 1; one of them infinite."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 37)
    x = (rng.normal(size=(37, 6, 7, 1)) + 3 * y[:, None, None, None]).astype("float32")
    if infinite is not None:
        x[infinite] = np.inf
    return x, y.astype("int32")


def trained(
    strategy: Any, norm: str, policy: str, infinite: int | None = None, scale: float = 2.0**15
) -> list[Any]:
    """The weights after an epoch; with an infinite example after its first batch alone.

    Args:
        strategy: as the backend's `strategy_over` gives it.
        norm: as `models.normalization_of` knows it, over two replicas.
        policy: a dtype policy.
        infinite: the number of an example of the first batch.
        scale: of the loss at first, in mixed_float16.
    """

    def make_model() -> Any:
        normalization = models.normalization_of(norm, 2, policy)
        model = models.build("mlp", normalization, (6, 7, 1), 2, policy)
        models.draw_kernels(model, 0)
        return model

    def make_optimizer() -> Any:
        optimizer = keras.optimizers.SGD(0.01)
        mixed = policy == "mixed_float16"
        return keras.optimizers.LossScaleOptimizer(optimizer, scale) if mixed else optimizer

    loop_class = _backends.get(keras.backend.backend(), "loop").ClassifierLoop
    loop = loop_class(strategy, make_model, make_optimizer)
    x, y = examples(infinite)
    for batch, size in loop.batches(x, y, np.arange(37 if infinite is None else 12), 12):
        loop.step(batch, size)
    weights: list[Any] = loop.weights()
    return weights


def largest_difference(ours: list[Any], reference: list[Any]) -> float:
    """Of any weight or moving statistic; a NaN is not lost."""
    gaps = [np.abs(own - its).max() for own, its in zip(ours, reference, strict=True)]
    return float(np.max(gaps))
