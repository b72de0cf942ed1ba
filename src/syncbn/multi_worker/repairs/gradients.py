"""Gradients are summed over the replicas before anything is made of them.

Keras clips on each replica and sums what is left, so that the update depends on how the batch was
split; Keras 2 summed first. Accumulating needs the sum as well before it decides by a condition,
where no collective can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras.src.backend.tensorflow.optimizer import TFOptimizer

from syncbn.multi_worker.reduced import are_reduced, reduced_gradients
from syncbn.multi_worker.repair import MISSING, Patch, source_probe
from syncbn.multi_worker.replicas import in_replica

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras sums the gradients only in the update, after clipping."""
    return source_probe(
        "keras.src.backend.tensorflow.optimizer.TFOptimizer._backend_update_step",
        broken="grads_and_vars = self._all_reduce_sum_gradients(grads_and_vars)",
        mended="grads_and_vars = list(zip(grads, trainable_variables)) tf.__internal__",
    )


def patches() -> list[Patch]:
    """The two ends: where gradients come in, and where Keras sums them."""
    return [
        Patch(TFOptimizer, "_backend_apply_gradients", _summing_first),
        Patch(TFOptimizer, "_all_reduce_sum_gradients", _summing_once),
    ]


def _summing_first(original: Any) -> Callable[..., None]:
    def _backend_apply_gradients(optimizer: Any, grads: Any, trainable_variables: Any) -> None:
        if original is MISSING:
            inherited = super(TFOptimizer, optimizer)._backend_apply_gradients
        else:
            inherited = original.__get__(optimizer)
        if not in_replica():
            return inherited(grads, trainable_variables)  # type: ignore[no-any-return]
        pairs = optimizer._all_reduce_sum_gradients(zip(grads, trainable_variables, strict=True))
        with reduced_gradients():
            return inherited([grad for grad, _ in pairs], trainable_variables)  # type: ignore[no-any-return]

    return _backend_apply_gradients


def _summing_once(original: Callable[..., Any]) -> Callable[..., Any]:
    def _all_reduce_sum_gradients(optimizer: Any, grads_and_vars: Any) -> Any:
        if are_reduced():
            return list(grads_and_vars)
        return original(optimizer, grads_and_vars)

    return _all_reduce_sum_gradients
