"""Training the user's model with its own `fit`, on one device or on replicas, and recording it.

Each step starts from the state that one device had before it: what is seen of a step is what that
step does, not what rounding became of in the steps before. Steps that agree one by one agree in a
row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from syncbn import _backends
from syncbn.errors import InputError
from syncbn.verification.batches import Batches
from syncbn.verification.program import built_model, optimizers_of
from syncbn.verification.recorder import Recorder
from syncbn.verification.recording import Step, Structure, Variable

__all__ = ["Keep", "backend", "perturbed", "run"]

# The number of the step from 0, the values of all variables before it, the step, and what the model
# is made of.
Keep = Callable[[int, list[Any], Step, Structure], None]


def backend(module: str = "verification") -> Any:
    """The module of Keras's backend."""
    return _backends.get(keras.backend.backend(), module)


def run(
    build_model: Callable[[], Any],
    batches: Batches,
    strategy: Any,
    state_before: Callable[[int], Sequence[Any]] | None,
    keep: Keep,
    hold: bool = False,
    repair: bool = False,
) -> None:
    """Train over all batches and hand on each step.

    Args:
        build_model: the user's.
        batches: global ones; of workers each has them whole.
        strategy: as the backend's `replicas.strategy_over` gives it.
        state_before: the values of all variables before a step, counted from 0; None to go on from
            step to step.
        keep: given each step.
        hold: whether layers that draw random numbers are in inference.
        repair: whether to do what syncbn has for the training, beyond `enable_multi_worker()`,
            which comes before.

    Raises:
        InputError: what build_model returns cannot be trained on these batches, or differs from
            what it returned before.
        Whatever `fit` raises.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend().on_replicas(strategy))
        model = built_model(build_model, batches)
        if repair:
            backend().repaired(model)
        recorder = Recorder(model, backend(), hold)
        stack.enter_context(recorder.attached())
        observer = _Observer(model, recorder, strategy, state_before, keep)
        model.fit(
            **backend().fed(batches, strategy, repair),
            epochs=1,
            shuffle=False,
            verbose=0,
            callbacks=[observer],
        )


class _Observer(keras.callbacks.Callback):
    """Between the steps: the state before, what was recorded, the state after."""

    def __init__(
        self,
        model: Any,
        recorder: Recorder,
        strategy: Any,
        state_before: Callable[[int], Sequence[Any]] | None,
        keep: Keep,
    ) -> None:
        super().__init__()
        self._recorder = recorder
        self._strategy = strategy
        self._state_before = state_before
        self._keep = keep
        found = _variables(model)
        self._variables = tuple(variable for variable, _ in found)
        self._all = [variable for _, variable in found]
        self._compared = [variable for kind, variable in found if kind.kind != "optimizer"]
        self._before: list[Any] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the state, and start the metrics anew, so that they are those of the step."""
        del logs
        self.model.reset_metrics()
        if self._state_before is not None:
            values = self._state_before(batch)
            _check_same(self._all, values)
            for variable, value in zip(self._all, values, strict=True):
                variable.assign(value)
        self._before = _first(backend().values(self._all, self._strategy))
        self._recorder.taken()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Take what was recorded."""
        backend().wait(self.model)
        step = self._recorder.taken()
        # What an optimizer remembers shows in the next step, and is the largest part of all.
        step.after = backend().values(self._compared, self._strategy)
        step.logs = {
            name: float(np.mean(keras.ops.convert_to_numpy(value)))
            for name, value in backend().logs(self.model, logs or {}).items()
        }
        structure = Structure(self.model.name, self._recorder.calls, self._variables)
        self._keep(batch, self._before, step, structure)


def _check_same(variables: Sequence[Any], values: Sequence[Any]) -> None:
    own = [tuple(variable.shape) for variable in variables]
    expected = [np.shape(value) for value in values]
    if own != expected:
        raise InputError(
            "A verification requires a function that returns a model of the same structure at "
            f"every call. Received: {len(expected)} variables at first, then {len(own)}, or of "
            "other shapes. Make what it depends on the same, such as a global or a file."
        )


def _first(values: dict[int, list[Any]]) -> list[Any]:
    return values[min(values)]


def _variables(model: Any) -> list[tuple[Variable, Any]]:
    """All variables that a step reads and writes, in an order that two builds have in common."""
    owners = {}
    prefix = f"{model.name}/"
    for layer in model._flatten_layers():
        for variable in (*layer._trainable_variables, *layer._non_trainable_variables):
            owners[id(variable)] = (layer.path or layer.name).removeprefix(prefix)
    found: list[tuple[Variable, Any]] = []
    known: set[int] = set()

    def add(variables: Sequence[Any], trainable: bool, kind: str) -> None:
        for variable in variables:
            if id(variable) in known:
                continue
            known.add(id(variable))
            own = "seed" if "seed" in variable.path and "int" in str(variable.dtype) else kind
            owner = owners.get(id(variable), "")
            path = variable.path.removeprefix(prefix)
            found.append((Variable(path, owner, trainable, own), variable))

    add(model.trainable_variables, True, "weight")
    add(model.weights, False, "state")
    add(model.non_trainable_variables, False, "state")
    for optimizer in optimizers_of(model):
        add(optimizer.variables, False, "optimizer")
    return found


def perturbed(values: Any, epsilon: float, seed: int) -> Any:
    """The same numbers, each off by the share epsilon to either side; what is no float stays."""
    random = np.random.default_rng(seed)

    def of_one(value: Any) -> Any:
        if not (isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)):
            return value
        signs = random.choice([-1.0, 1.0], size=value.shape)
        return (value * (1 + signs * epsilon)).astype(value.dtype)

    return tree.map_structure(of_one, values)
