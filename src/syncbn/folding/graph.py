"""What Keras knows of a model's dataflow: calls of layers, and who takes what they give.

Keras has no public name for any of it: nodes, a Functional's own class, a Sequential's graph and
the layers inside a layer are read here and nowhere else in this folder.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
from keras.src.models.functional import Functional

__all__ = [
    "Call",
    "Dataflow",
    "Graph",
    "Hidden",
    "copy_of_operation",
    "graph_of",
    "input_layers",
    "is_distributed",
    "layers_inside",
    "model_inside",
    "output_operations",
    "run_through",
    "unwrapped",
]


def graph_of(model: Any) -> Any:
    """The functional graph that a call of the model runs, or None where Keras knows of none."""
    if isinstance(model, keras.Sequential):
        return model._functional if type(model).call is keras.Sequential.call else None
    known = isinstance(model, Functional) and type(model).call is Functional.call
    return model if known else None


def is_distributed(operation: Any) -> bool:
    """Whether it does nothing but call another layer, at each time."""
    return type(operation) is keras.layers.TimeDistributed


def unwrapped(operation: Any) -> Any:
    """The layer that the operation is, or calls at each time."""
    return operation.layer if is_distributed(operation) else operation


def model_inside(operation: Any) -> Any | None:
    """The model of a known dataflow that an operation is, or calls at each time."""
    model = unwrapped(operation)
    return model if graph_of(model) is not None else None


def layers_inside(layer: Any) -> Iterator[Any]:
    """The layer itself and, in the order of their making, all layers inside it."""
    return iter(layer._flatten_layers())


class Call(NamedTuple):
    """One call of an operation in a graph."""

    operation: Any
    # As Keras recorded them: symbolic tensors among other values.
    arguments: dict[str, Any]
    outputs: list[Any]
    inputs: list[Any]  # all tensors among the arguments, masks too

    def is_in_training(self) -> bool:
        """Whether it asks for training=True, whatever the model is called with."""
        return bool(self.arguments.get("training"))

    def has_own_mask(self) -> bool:
        """Whether a mask is given that is not the one that Keras hands on with the inputs."""
        mask = self.arguments.get("mask")
        return mask is not None and mask is not getattr(
            self.arguments.get("inputs"), "_keras_mask", None
        )


class Graph(NamedTuple):
    """The dataflow of one model."""

    path: str  # names of the models around it, "backbone/"; "" of the model itself
    calls: list[Call]  # the callers of what a call gives come after it
    made_by: dict[int, Call]  # by the identity of a tensor
    takers: dict[int, list[str]]  # names of those that take a tensor, by its identity
    in_training: bool  # a call of this model asks for training=True


class Hidden(NamedTuple):
    """A layer that another layer's own code calls, or does not call."""

    layer: Any
    path: str
    outer: str  # the path of that other layer
    outer_class: str


class Dataflow:
    """The graphs of a model and of all models of a known dataflow inside it, each once."""

    def __init__(self, model: Any) -> None:
        self.graphs: list[Graph] = []
        self.hidden: dict[int, Hidden] = {}  # by the identity of the layer
        self._times_called: collections.Counter[int] = collections.Counter()
        self._seen: set[int] = set()
        self._add(model, "", in_training=False)

    def times_called(self, operation: Any) -> int:
        """How often the graphs call it, itself or at each time."""
        return self._times_called[id(operation)]

    def _add(self, model: Any, path: str, *, in_training: bool) -> None:
        if id(model) in self._seen:
            return
        self._seen.add(id(model))
        graph = _graph(graph_of(model), path, in_training)
        self.graphs.append(graph)
        asked: dict[int, bool] = collections.defaultdict(bool)
        for call in graph.calls:
            for operation in {id(call.operation), id(unwrapped(call.operation))}:
                self._times_called[operation] += 1
            asked[id(call.operation)] |= call.is_in_training()
        for call in graph.calls:
            inner = model_inside(call.operation)
            own = f"{path}{call.operation.name}"
            if inner is not None:
                training = in_training or asked[id(call.operation)]
                self._add(inner, f"{own}/", in_training=training)
            elif isinstance(call.operation, keras.layers.Layer):
                self._hide(unwrapped(call.operation), own)

    def _hide(self, outer: Any, path: str) -> None:
        for layer in list(layers_inside(outer))[1:]:
            # Keras's own path of it has the names between, once it has variables.
            hidden = Hidden(layer, f"{path}/{layer.name}", path, type(outer).__name__)
            self.hidden.setdefault(id(layer), hidden)


def _graph(functional: Any, path: str, in_training: bool) -> Graph:
    nodes = [
        node
        for depth in sorted(functional._nodes_by_depth, reverse=True)
        for node in functional._nodes_by_depth[depth]
        if node.operation is not None and not node.is_input
    ]
    calls = [
        Call(node.operation, _named(node), list(node.outputs), list(node.input_tensors))
        for node in nodes
    ]
    takers: dict[int, list[str]] = collections.defaultdict(list)
    for call in calls:
        for tensor in call.inputs:
            takers[id(tensor)].append(f'"{call.operation.name}"')
    for tensor in functional.outputs:
        takers[id(tensor)].append("the outputs of the model")
    made_by = {id(tensor): call for call in calls for tensor in call.outputs}
    return Graph(path, calls, made_by, dict(takers), in_training)


def _named(node: Any) -> dict[str, Any]:
    """The arguments of a call by the names in the signature of the operation's `call`."""
    arguments = node.arguments
    try:
        bound = inspect.signature(node.operation.call).bind(*arguments.args, **arguments.kwargs)
    except TypeError:  # Keras takes `training` where `call` does not
        return dict(arguments.kwargs)
    return dict(bound.arguments)


def input_layers(functional: Any) -> list[Any]:
    """The layers that make the inputs, in their order."""
    return [tensor._keras_history.operation for tensor in functional.inputs]


def output_operations(functional: Any) -> set[int]:
    """The identities of what makes the outputs."""
    return {id(tensor._keras_history.operation) for tensor in functional.outputs}


def run_through(functional: Any, inputs: list[Any], operation_for: Callable[[Any], Any]) -> Any:
    """The outputs, in their structure, by other operations in place of the model's."""
    return functional._run_through_graph(inputs, operation_fn=operation_for)


def copy_of_operation(operation: Any) -> Any:
    """An operation that is no layer, such as `keras.ops.add`, of which no call is known yet."""
    made = object.__new__(type(operation))
    vars(made).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
    return made
