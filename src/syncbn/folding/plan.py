"""Which batch normalizations can be folded, and why the others cannot, before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from syncbn.errors import InputError
from syncbn.folding.graph import Call, Dataflow, Graph, graph_of, is_distributed, unwrapped
from syncbn.folding.kernels import affine_of, channel_axis, folded_weights, is_linear
from syncbn.layer import SyncBatchNormalization

__all__ = ["Folded", "FoldingPlan", "Left", "Target", "plan_folding", "targets_of"]


class Folded(NamedTuple):
    """A batch normalization that goes into the layer before it."""

    path: str  # names from the model's layers down to it, by slashes
    into: str  # the path of that layer
    layer: Any  # the batch normalization itself


class Left(NamedTuple):
    """A batch normalization that stays as it is."""

    path: str
    reason: str
    layer: Any


class FoldingPlan(NamedTuple):
    """What `fold` would do with a model, as data. `str()` gives the line that `fold` says."""

    model: str  # its name
    folded: tuple[Folded, ...]
    left: tuple[Left, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan in strings, lists and dictionaries, as for JSON."""
        return {
            "model": self.model,
            "folded": [{"path": one.path, "into": one.into} for one in self.folded],
            "left": [{"path": one.path, "reason": one.reason} for one in self.left],
        }

    def __str__(self) -> str:
        total = len(self.folded) + len(self.left)
        if not total:
            return f"{self.model}: there is no batch normalization to fold."
        said = f"{self.model}: {len(self.folded)} of {total} batch normalizations folded"
        if self.left:
            first = self.left[0]
            said += f"; {len(self.left)} left as they are, as {first.path} ({first.reason})"
        return f"{said}."


class Target:
    """A layer into which batch normalizations go, one after another."""

    def __init__(self, call: Call, path: str) -> None:
        self.operation = call.operation  # the layer, or a TimeDistributed around it
        self.layer = unwrapped(call.operation)
        self.path = path
        self.norms: list[Any] = []
        self.gone: list[Any] = []  # the operations that they are in the graph

    @property
    def activation(self) -> Any:
        """What is applied to the outputs, by the layer or inside of the last normalization."""
        return _activation_of(self.norms[-1] if self.norms else self.layer)


class _No(Exception):  # noqa: N818 - an answer, not an error
    """Why a batch normalization is left."""


def plan_folding(model: Any) -> FoldingPlan:
    """What `fold` would do with a model, as data: nothing is made or changed.

    `plan.folded` and `plan.left` have every batch normalization with its path and, where it is
    left, the reason; `plan.as_dict()` is for JSON.

    Args:
        model: as `fold` takes it.

    Returns:
        The plan, whose names are those of the model's layers.

    Raises:
        InputError: as `fold`.

    References:
        As `fold`.
    """
    return targets_of(model)[1]


def targets_of(model: Any) -> tuple[list[Target], FoldingPlan]:
    """The layers into which something goes, and the same as the plan that users see."""
    _check_model(model)
    dataflow = Dataflow(model)
    targets: dict[int, Target] = {}  # by the identity of a tensor that is theirs
    folded: list[Folded] = []
    left: list[Left] = []
    known: set[int] = set()  # the identities of those in one of the two lists
    for graph in dataflow.graphs:
        for call, path, norm in _batch_normalizations(graph):
            if id(norm) in known:
                continue
            known.add(id(norm))
            try:
                target = _target(call, norm, graph, dataflow, targets)
            except _No as answer:
                left.append(Left(path, str(answer), norm))
                continue
            target.norms.append(norm)
            target.gone.append(call.operation)
            targets[id(call.outputs[0])] = target
            folded.append(Folded(path, target.path, norm))
    for hidden in dataflow.hidden.values():
        is_norm = isinstance(hidden.layer, keras.layers.BatchNormalization)
        if is_norm and id(hidden.layer) not in known:
            reason = f"it is called by the code of {hidden.outer_class}, which Keras does not know"
            left.append(Left(hidden.path, reason, hidden.layer))
    unique = list({id(target): target for target in targets.values()}.values())
    return unique, FoldingPlan(model.name, tuple(folded), tuple(left))


def _check_model(model: Any) -> None:
    if graph_of(model) is not None:
        return
    received = f"{type(model).__module__}.{type(model).__name__}"
    remedy = "Give the model itself."
    if isinstance(model, keras.Sequential) and not model.built:
        received += ", which is not built"
        remedy = "Build it: model.build(input_shape), or begin it with keras.Input."
    elif isinstance(model, keras.Model):
        received += ", whose dataflow its own `call` decides"
        remedy = "Fold the functional and Sequential models that it is made of, before it is made."
    raise InputError(
        "syncbn.fold requires a functional or Sequential model of Keras 3, whose dataflow Keras "
        f"knows. Received: {received}. {remedy}"
    )


def _batch_normalizations(graph: Graph) -> Iterator[tuple[Call, str, Any]]:
    for call in graph.calls:
        norm = unwrapped(call.operation)
        if isinstance(norm, keras.layers.BatchNormalization):
            path = f"{graph.path}{call.operation.name}"
            yield call, f"{path}/{norm.name}" if is_distributed(call.operation) else path, norm


def _target(
    call: Call, norm: Any, graph: Graph, dataflow: Dataflow, targets: dict[int, Target]
) -> Target:
    """The layer that the normalization goes into; a `_No` where there is none."""
    _check_norm(call, norm, graph, dataflow)
    source = call.arguments["inputs"]
    maker = graph.made_by.get(id(source))
    if maker is None:
        raise _No("its input is the model's")
    target = targets.get(id(source)) or Target(maker, f"{graph.path}{maker.operation.name}")
    _check_layer(target, dataflow)
    takers = graph.takers[id(source)]
    if len(takers) > 1:
        others = [taker for taker in takers if taker != f'"{call.operation.name}"']
        raise _No(f'the outputs of "{maker.operation.name}" go elsewhere too: to {others[0]}')
    if target.activation is not None:
        raise _No(f'"{maker.operation.name}" applies an activation before it')
    _check_fit(target, call, norm)
    return target


def _check_norm(call: Call, norm: Any, graph: Graph, dataflow: Dataflow) -> None:
    if type(norm) not in (keras.layers.BatchNormalization, SyncBatchNormalization):
        raise _No(f"{type(norm).__name__} is a class of its own")
    if dataflow.times_called(norm) > 1 or id(norm) in dataflow.hidden:
        raise _No("it is called in several places")
    if call.has_own_mask():
        raise _No("it is called with a mask of its own")
    if call.arguments.get("weights") is not None:
        raise _No("it is called with `weights`")
    # Keras itself decides by how the model is called whether this holds.
    if (call.is_in_training() or graph.in_training) and norm.trainable:
        raise _No("it is called with training=True")


def _check_layer(target: Target, dataflow: Dataflow) -> None:
    layer, name = target.layer, target.operation.name
    if not is_linear(layer):
        raise _No(f'its input is that of "{name}" ({type(layer).__name__})')
    if dataflow.times_called(layer) > 1:
        raise _No(f'"{name}" is called in several places')
    if id(layer) in dataflow.hidden:
        raise _No(f'"{name}" is also called by "{dataflow.hidden[id(layer)].outer}"')
    if getattr(layer, "quantization_mode", None) is not None:
        raise _No(f'"{name}" is quantized')
    if getattr(layer, "lora_enabled", False):
        raise _No(f'"{name}" is adapted by LoRA')


def _check_fit(target: Target, call: Call, norm: Any) -> None:
    name = target.operation.name
    rank = len(call.outputs[0].shape)
    own = int(is_distributed(target.operation))  # of a TimeDistributed, the axis of the times
    its = int(is_distributed(call.operation))
    channels = channel_axis(target.layer, rank - own)
    axis = norm.axis % (rank - its) + its
    if channels is None or axis != channels + own:
        found = "none" if channels is None else channels + own
        raise _No(f'its axis is {axis}, that of the channels of "{name}" {found}')
    tensors = (call.arguments["inputs"], call.outputs[0])
    before, after = (keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors)
    if before != after:
        raise _No(f'it makes {after} of the {before} of "{name}"')
    # keras.ops.add takes it for that of channels_last (seen in 3.15, with any layer's bias).
    confused = keras.backend.backend() == "tensorflow" and axis != rank - 1
    if confused and call.outputs[0].shape[-1] == call.outputs[0].shape[axis]:
        raise _No(f'Keras adds a bias of "{name}" along its last axis, which is as long')
    norms = [affine_of(one) for one in (*target.norms, norm)]
    if folded_weights(target.layer, norms) is None:
        raise _No(f'the weights of "{name}" would not be finite')


def _activation_of(layer: Any) -> Any:
    activation = getattr(layer, "activation", None)
    return None if activation is keras.activations.linear else activation
