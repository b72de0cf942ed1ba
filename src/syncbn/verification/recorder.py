"""What a train step computes, seen from outside: outputs of layers, losses, gradients.

Methods of the objects of one model are wrapped, and given back afterwards; no class is touched.
What the wrappers see are often tensors of a graph: the backend's `observe` hands on the numbers
when there are any.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import tree

from syncbn._keras import without_autocast
from syncbn.verification.describing import described, draws
from syncbn.verification.program import optimizers_of
from syncbn.verification.recording import LayerCall, Step

__all__ = ["Recorder"]


class Recorder:
    """Records the steps of one model.

    Args:
        model: built and compiled; its train step must not have been traced yet.
        backend: the module `verification` of Keras's backend.
        hold: whether layers that draw random numbers are in inference.
    """

    def __init__(self, model: Any, backend: Any, hold: bool = False) -> None:
        self._model = model
        self._hold = hold
        self._backend = backend
        self._lock = threading.Lock()
        self._counts = threading.local()
        self._calls: dict[str, Any] = {}  # layers, in the order in which they were first called
        self._step = Step()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Meanwhile what the model does is recorded."""
        with contextlib.ExitStack() as undo:
            for layer in self._model._flatten_layers(include_self=False):
                if not isinstance(layer, keras.layers.InputLayer):
                    undo.enter_context(_wrapped(layer, "call", self._of_layer(layer)))
            undo.enter_context(_wrapped(self._model, "train_step", self._of_step))
            undo.enter_context(_wrapped(self._model, "compute_loss", self._of_loss))
            for optimizer in optimizers_of(self._model):
                undo.enter_context(_wrapped(optimizer, "apply", self._of_gradients))
            yield

    @property
    def calls(self) -> tuple[LayerCall, ...]:
        """The calls of layers, in the order in which the step makes them."""
        return tuple(described(key, layer) for key, layer in self._calls.items())

    def taken(self) -> Step:
        """What was recorded since the last call of this."""
        with self._lock:
            step, self._step = self._step, Step()
        return step

    def _of_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def train_step(*arguments: Any, **options: Any) -> Any:
            self._counts.of_layer = {}
            # The last of them is the data: on JAX the state is before it.
            self._observe(arguments[-1], self._keep_data)
            return original(*arguments, **options)

        return train_step

    def _of_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(*arguments: Any, **options: Any) -> Any:
            loss = original(*arguments, **options)
            self._observe(loss, self._keep_loss)
            return loss

        return compute_loss

    def _of_gradients(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def apply(grads: Any, trainable_variables: Any = None) -> Any:
            variables = trainable_variables
            if variables is None:
                variables = original.__self__._trainable_variables  # type: ignore[attr-defined]
            numbers = {
                id(one): number for number, one in enumerate(self._model.trainable_variables)
            }
            found = {
                numbers[id(variable)]: self._backend.dense(gradient)
                for gradient, variable in zip(grads, variables, strict=True)
                if gradient is not None and id(variable) in numbers
            }

            def keep(replica: int, values: list[Any]) -> None:
                self._keep_gradients(replica, dict(zip(found, values, strict=True)))

            self._observe(list(found.values()), keep)
            if trainable_variables is None:
                return original(grads)
            return original(grads, trainable_variables)

        return apply

    def _of_layer(self, layer: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        normalizes = isinstance(layer, keras.layers.BatchNormalization)
        is_held = self._hold and draws(layer)

        def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if is_held and options.get("training"):
                    options["training"] = False
                outputs = original(*arguments, **options)
                counts = getattr(self._counts, "of_layer", None)
                if counts is None:  # not in a train step: Keras builds, or asks for shapes
                    return outputs
                counts[id(layer)] = counts.get(id(layer), 0) + 1
                key = self._key(layer, counts[id(layer)])
                self._observe(outputs, lambda replica, values: self._keep(key, replica, values))
                if normalizes and _trains(layer, arguments, options):
                    seen = self._seen(layer, arguments, options)
                    self._observe(
                        list(seen.values()),
                        lambda replica, values: self._keep_inputs(
                            key, replica, dict(zip(seen, values, strict=True))
                        ),
                    )
                return outputs

            return call

        return wrapper

    def _seen(
        self, layer: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> dict[str, Any]:
        """What a batch normalization computes its outputs from."""
        inputs = arguments[0] if arguments else options["inputs"]
        mask = options.get("mask")
        mask = getattr(inputs, "_keras_mask", None) if mask is None else mask
        seen = {"inputs": inputs, "mask": mask, "weights": options.get("weights")}
        with without_autocast():
            for name in ("gamma", "beta"):
                variable = getattr(layer, name, None)
                seen[name] = None if variable is None else self._backend.dense(variable.value)
        return {name: value for name, value in seen.items() if self._backend.is_numeric(value)}

    def _key(self, layer: Any, count: int) -> str:
        path = (layer.path or layer.name).removeprefix(f"{self._model.name}/")
        key = path if count == 1 else f"{path} [call {count}]"
        with self._lock:
            twin = 1
            # Two layers of one path, as those of a list of the user's may be.
            while self._calls.setdefault(key, layer) is not layer:
                twin += 1
                key = f"{path} [{twin}]" + f" [call {count}]" * (count > 1)
        return key

    def _observe(self, values: Any, keep: Callable[[int, list[Any]], None]) -> None:
        tensors = [value for value in tree.flatten(values) if self._backend.is_numeric(value)]
        if tensors:
            self._backend.observe(tensors, keep)

    def _keep(self, key: str, replica: int, values: list[Any]) -> None:
        with self._lock:
            self._step.outputs[key, replica] = _copied(values)

    def _keep_inputs(self, key: str, replica: int, values: dict[str, Any]) -> None:
        with self._lock:
            self._step.inputs[key, replica] = dict(
                zip(values, _copied(list(values.values())), strict=True)
            )

    def _keep_data(self, replica: int, values: list[Any]) -> None:
        with self._lock:
            self._step.data[replica] = _copied(values)

    def _keep_loss(self, replica: int, values: list[Any]) -> None:
        with self._lock:
            # A step of the user's own may compute several.
            self._step.losses.setdefault(replica, []).append(float(values[0]))

    def _keep_gradients(self, replica: int, values: dict[int, Any]) -> None:
        with self._lock:
            kept = self._step.gradients.setdefault(replica, {})
            kept.update(zip(values, _copied(list(values.values())), strict=True))


def _trains(layer: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether it normalizes by the batch."""
    training = arguments[1] if len(arguments) > 1 else options.get("training")
    return bool(training) and bool(layer.trainable)


def _copied(values: list[Any]) -> list[Any]:
    return [np.array(value) for value in values]


@contextlib.contextmanager
def _wrapped(
    thing: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Meanwhile a method of this one object is another, past what Keras tracks of attributes."""
    attributes = vars(thing)
    own = name in attributes
    before = getattr(thing, name)
    attributes[name] = wrapper(before)
    try:
        yield
    finally:
        if own:
            attributes[name] = before
        else:
            del attributes[name]
