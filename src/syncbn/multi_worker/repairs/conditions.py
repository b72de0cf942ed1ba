"""Conditions of the optimizers: gradient accumulation, and overwriting by the moving average.

Keras asks `ops.cond` on each replica and updates variables in its branches by `merge_call`, which
is refused inside a condition. The replicas have to come together first: then the one condition is
asked, and each goes on in the branch. Keras's LossScaleOptimizer does so for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.optimizers import base_optimizer

from syncbn.multi_worker.reduced import are_reduced, reduced_gradients
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import in_replica

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras's optimizers ask conditions on each replica."""
    return source_probe(
        "keras.src.optimizers.base_optimizer.BaseOptimizer._backend_apply_gradients",
        broken="ops.cond( is_update_step,",
        mended="_backend_cond(",
    )


def patches() -> list[Patch]:
    """`ops.cond` as the base optimizer sees it; overwriting in a replica."""
    return [
        Patch(base_optimizer, "ops", _OpsOfOptimizers),
        Patch(TFOptimizer, "_overwrite_model_variables_with_average_value", _overwriter),
    ]


class _OpsOfOptimizers(ModuleType):
    """`keras.ops` with a `cond` that replicas ask together."""

    def __init__(self, ops: Any) -> None:
        super().__init__(ops.__name__, ops.__doc__)
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def cond(self, pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
        """One of the branches, for effect; every replica has the same `pred`."""
        if not in_replica():
            return self._ops.cond(pred, true_fn, false_fn)
        reduced = are_reduced()

        def on_each(strategy: Any, branch: Any) -> None:
            def run(function: Callable[[], Any]) -> None:
                with reduced_gradients(reduced):
                    function()

            strategy.extended.call_for_each_replica(run, args=(branch,))

        def together(strategy: Any, preds: Any, trues: Any, falses: Any) -> None:
            first = strategy.experimental_local_results(preds)[0]
            self._ops.cond(
                first, lambda: on_each(strategy, trues), lambda: on_each(strategy, falses)
            )

        context = tf.distribute.get_replica_context()
        return context.merge_call(together, args=(pred, true_fn, false_fn))


def _overwriter(original: Callable[..., None]) -> Callable[..., None]:
    def _overwrite_model_variables_with_average_value(
        optimizer: Any, trainable_variables: Any
    ) -> None:
        if not in_replica():
            return original(optimizer, trainable_variables)

        def together(_: Any) -> None:
            original(optimizer, trainable_variables)

        tf.distribute.get_replica_context().merge_call(together)
        return None

    return _overwrite_model_variables_with_average_value
