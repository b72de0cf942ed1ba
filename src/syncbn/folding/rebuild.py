"""A model made anew, call by call: with other layers in some places and nothing in others."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable, Mapping
from typing import Any

import keras

from syncbn.errors import InputError
from syncbn.folding.graph import (
    copy_of_operation,
    graph_of,
    input_layers,
    is_distributed,
    layers_inside,
    model_inside,
    output_operations,
    run_through,
)
from syncbn.folding.kernels import affine_of, bias_axes, folded_weights
from syncbn.folding.plan import Target

__all__ = ["Rebuilding"]


class Rebuilding:
    """Makes one new operation for each that a model has, whatever calls it and how often."""

    def __init__(self, targets: list[Target]) -> None:
        self._targets = {id(target.operation): target for target in targets}
        self._gone = {id(operation) for target in targets for operation in target.gone}
        self._made: dict[int, Any] = {}
        # What the weights wait for: layers are built when they are called.
        self._copied: list[tuple[Any, Any]] = []
        self._folded: list[tuple[Target, Any]] = []

    def of(self, model: Any) -> Any:
        """The new model, with its weights."""
        result = self._model(model, is_outermost=True)
        for old, new in self._copied:
            _copy_state(old, new)
        for target, layer in self._folded:
            weights = folded_weights(target.layer, [affine_of(norm) for norm in target.norms])
            if weights is None:
                raise InputError(
                    "syncbn.fold requires weights that nothing else changes meanwhile. Received: "
                    f'others in "{target.path}" than when folding was planned. Fold again.'
                )
            for name, value in weights.items():
                getattr(layer, name).assign(value)
        return result

    def _model(self, model: Any, *, is_outermost: bool = False) -> Any:
        graph = graph_of(model)
        # The names of a model's outputs are those of the layers that they come from.
        named = output_operations(graph) & self._gone if is_outermost else set()
        inputs = [self._again(operation) for operation in input_layers(graph)]
        if isinstance(model, keras.Sequential):
            kept = [layer for layer in model.layers if id(layer) not in self._gone - named]
            layers = [self._operation(layer, named) for layer in kept]
            return keras.Sequential([*inputs, *layers], name=model.name)
        tensors = [layer.output for layer in inputs]
        outputs = run_through(graph, tensors, lambda one: self._caller(one, named))
        renewed = {id(old): new for old, new in zip(graph.inputs, tensors, strict=True)}
        structure = _mapped(lambda tensor: renewed[id(tensor)], graph.input)
        return keras.Model(structure, outputs, name=model.name)

    def _caller(self, operation: Any, named: set[int]) -> Callable[..., Any]:
        """What a call of an operation becomes."""
        if id(operation) not in self._gone:
            called: Callable[..., Any] = self._operation(operation, named)
            return called
        name = self._operation(operation, named) if id(operation) in named else None
        # Without the mask that the normalization was called with.
        return lambda inputs, *_, **__: inputs if name is None else name(inputs)

    def _operation(self, operation: Any, named: set[int]) -> Any:
        """What takes the place of an operation: always the same one."""
        if id(operation) not in self._made:
            self._made[id(operation)] = self._made_for(operation, named)
        return self._made[id(operation)]

    def _made_for(self, operation: Any, named: set[int]) -> Any:
        if id(operation) in named:
            return keras.layers.Identity(name=operation.name, dtype=operation.compute_dtype)
        inner: Any = None
        if target := self._targets.get(id(operation)):
            inner = self._linear(target)
        elif model := model_inside(operation):
            is_whole = model is operation
            inner = self._model(model) if is_whole else self._operation(model, set())
        if inner is not None:
            return _distributed(operation, inner) if is_distributed(operation) else inner
        if not isinstance(operation, keras.layers.Layer):
            return copy_of_operation(operation)
        made = self._again(operation)
        self._copied.append((operation, made))
        return made

    def _linear(self, target: Target) -> Any:
        """The layer that does what the target and its normalizations did, without weights yet."""
        changes: dict[str, Any] = {"use_bias": True}
        if axes := bias_axes(target.layer):
            changes = {"bias_axes": axes}
        made = self._again(target.layer, changes)
        if target.activation is not None:
            made.activation = target.activation
        self._folded.append((target, made))
        return made

    def _again(self, layer: Any, changes: Mapping[str, Any] | None = None) -> Any:
        """A layer of the same class and configuration."""
        if type(layer) is keras.layers.Lambda:
            return _lambda(layer)
        try:
            config = layer.get_config()
            if changes is not None:
                # They are of the kernel that was trained, not of the one that is folded.
                trained = ("_regularizer", "_constraint")
                config = {k: None if k.endswith(trained) else v for k, v in config.items()}
                config |= changes
            with keras.saving.custom_object_scope(_own_objects(layer)):
                return type(layer).from_config(config)
        # What stops it is the layer's own code, which may raise anything.
        except Exception as error:
            raise InputError(
                "syncbn.fold requires layers that can be made anew from their configuration. "
                f"Received: layer {layer.name!r} of class {type(layer).__name__}, which cannot: "
                f"{error} Give its class a `get_config` and `from_config` that fit, and register "
                "its functions by keras.saving.register_keras_serializable."
            ) from error


def _distributed(operation: Any, inner: Any) -> Any:
    return keras.layers.TimeDistributed(inner, name=operation.name, dtype=operation.dtype_policy)


def _lambda(layer: Any) -> Any:
    """Keras refuses to make one from its configuration, as that of a file would be any code."""
    return keras.layers.Lambda(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=layer.dtype_policy,
    )


def _own_objects(layer: Any) -> dict[str, Any]:
    """Classes and functions by which the layer was made, registered or not."""
    classes = {type(one).__name__: type(one) for one in layers_inside(layer)}
    functions = {
        value.__name__: value
        for value in vars(layer).values()
        if isinstance(value, types.FunctionType) and value.__name__ != "<lambda>"
    }
    return classes | functions


def _mapped(function: Callable[[Any], Any], structure: Any) -> Any:
    if isinstance(structure, dict):
        return {key: _mapped(function, value) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)([_mapped(function, value) for value in structure])
    return function(structure)


def _copy_state(old: Any, new: Any) -> None:
    """What Keras saves of a layer and of those inside it: variables, and what is in files."""
    for own, its in zip(layers_inside(old), layers_inside(new), strict=True):
        store: dict[str, Any] = {}
        own.save_own_variables(store)
        its.load_own_variables(
            {name: keras.ops.convert_to_numpy(value) for name, value in store.items()}
        )
        if hasattr(own, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                own.save_assets(folder)
                its.load_assets(folder)
