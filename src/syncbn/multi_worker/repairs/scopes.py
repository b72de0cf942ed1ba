"""What was made outside of the strategy is named before training starts.

Keras fails deep within the first step there ("Mixing different tf.distribute.Strategy objects",
"Need to be inside with strategy.scope()"), or trains on without synchronizing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

from syncbn.errors import InputError
from syncbn.multi_worker.operations import OPERATIONS
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import replica_count

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras takes a model as it is."""
    return source_probe(
        "keras.src.backend.tensorflow.trainer.TensorFlowTrainer.fit",
        broken='self._assert_compile_called("fit")',
    )


def patches() -> list[Patch]:
    """Everything that trains, evaluates or predicts."""
    return [Patch(TensorFlowTrainer, method, _checking(method)) for method in OPERATIONS]


def _checking(method: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def checked(model: Any, *args: Any, **kwargs: Any) -> Any:
            check_scopes(model, method)
            return original(model, *args, **kwargs)

        return checked

    return wrap


def check_scopes(model: Any, method: str) -> None:
    """Make sure that the model and what it is compiled with belong to its strategy.

    Raises:
        InputError: a part of them was made elsewhere; the error says which part.
    """
    strategy = model._distribute_strategy
    current = tf.distribute.get_strategy()
    if strategy is None:
        if replica_count(current) > 1:
            raise InputError(_message(method, current, "a model made outside of it"))
        return
    if replica_count(strategy) == 1:
        return
    optimizer = getattr(model, "optimizer", None)
    inner = getattr(optimizer, "inner_optimizer", None)
    for part in (optimizer, inner):
        if part and getattr(part, "_distribution_strategy", strategy) is not strategy:
            found = f"the optimizer {part.name!r}, made (or compiled) outside of it"
            raise InputError(_message(method, strategy, found))
    own = model.variables + (model.metrics_variables if getattr(model, "compiled", False) else [])
    strays = [v.path for v in own if _owner(v) is not strategy]
    if strays:
        found = f"{len(strays)} variables made outside of it, as {strays[0]!r}"
        raise InputError(_message(method, strategy, found))


def _owner(variable: Any) -> Any:
    return getattr(variable.value, "distribute_strategy", None)


def _message(method: str, strategy: Any, found: str) -> str:
    return (
        f"{method} on the {replica_count(strategy)} replicas of {type(strategy).__name__} requires "
        "that the model, its optimizer and its metrics were made inside of that strategy's scope. "
        f"Received: {found}. Build and compile the model inside `with strategy.scope():`."
    )
