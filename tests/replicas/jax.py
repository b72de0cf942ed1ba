"""The layer on replicas as JAX has them: mapped axes, and devices of a `keras.distribution`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import syncbn
from tests.harness import Case, Observed

DEVICES = 8

MAPPED = ("shard_map", "shard_map unchecked", "pmap", "vmap")
DISTRIBUTED = ("data parallel", "model parallel")


def start() -> None:
    """Prepare the process, once."""
    jax.config.update("jax_num_cpu_devices", DEVICES)


def precision_of(dtype: str) -> Any:
    """A scope where arrays of that dtype exist: float64 does by an option alone."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def make_layer(case: Case, dtype: str = "float32", **arguments: Any) -> Any:
    """A layer that holds the case's weights, or those of `state` by name."""
    layer_class = arguments.pop("layer_class", syncbn.SyncBatchNormalization)
    state = arguments.pop("state", None) or {}
    layer = layer_class(
        axis=case.axis,
        epsilon=case.epsilon,
        momentum=case.momentum,
        dtype=dtype,
        **(dict(case.options) | arguments),
    )
    shape: list[int | None] = [None] * case.parts[0].ndim
    shape[case.axis] = len(case.gamma)
    layer.build(tuple(shape))
    if layer.scale:
        layer.gamma.assign(case.gamma)
    if layer.center:
        layer.beta.assign(case.beta)
    for weight in layer.weights:
        if weight.name in state:
            weight.assign(state[weight.name])
    return layer


class State(NamedTuple):
    trainable: list[Any]
    others: list[Any]

    @classmethod
    def of(cls, layer: Any) -> State:
        return cls(
            [v.value for v in layer.trainable_variables],
            [v.value for v in layer.non_trainable_variables],
        )


def make_step(layer: Any, training: bool = True) -> Any:
    """A pure function of a replica's part: outputs, gradients, the state after the step."""

    def step(state: State, x: Any, dy: Any, **call_arguments: Any) -> Any:
        def forward(x: Any, trainable: Any) -> Any:
            return layer.stateless_call(
                trainable, state.others, x, training=training, **call_arguments
            )

        y, pull_back, others = jax.vjp(forward, x, state.trainable, has_aux=True)
        dx, of_weights = pull_back(dy.astype(y.dtype))
        return y, dx, of_weights, others

    return step


def observe(
    case: Case,
    *,
    mode: str = "graph",
    dtype: str | None = None,
    context: str | None = None,
    training: bool = True,
    **arguments: Any,
) -> Observed:
    """What the replicas see in one training step.

    Every device holds as much as any other: smaller parts are filled up with elements of weight 0
    that are NaN, and what comes back for these is cut off.

    Args:
        case: data and weights; a part for each replica. One part alone is not mapped.
        mode: "graph" for `jit`, "eager" for none.
        dtype: the layer's policy; the data's own by default.
        context: one of MAPPED or DISTRIBUTED; by default `shard_map`, and in eager mode `vmap`:
            without `jit` `shard_map` compiles every operation in every call, for seconds.
        training: what the layer is called with.
        **arguments: of the layer; `state`, of `make_layer`.
    """
    data = case.parts[0].dtype.name
    context = context or ("shard_map" if mode == "graph" else "vmap")
    wide = "float64" if "float64" in (data, dtype) else data
    with precision_of(wide), distributed(context, len(case.parts)):
        if context == "vmap" and len(case.parts) > 1:
            arguments = {"axis_name": "data"} | arguments
        layer = make_layer(case, dtype or data, **arguments)
        run = _RUNS["one" if len(case.parts) == 1 and context in MAPPED else context]
        y, dx, of_weights, others = run(
            make_step(layer, training), State.of(layer), filled_up(case), mode
        )
        return _observed(case, layer, y, dx, of_weights, others)


@contextlib.contextmanager
def distributed(context: str, replicas: int) -> Iterator[None]:
    """Keras's distribution of that name, over so many parts of the batch."""
    if context not in DISTRIBUTED:
        yield
        return
    width = 1 if context == "data parallel" else 2
    devices = [f"cpu:{i}" for i in range(replicas * width)]
    if context == "data parallel":
        distribution = keras.distribution.DataParallel(devices=devices)
    else:
        mesh = keras.distribution.DeviceMesh((replicas, 2), ["batch", "model"], devices)
        layout = keras.distribution.LayoutMap(mesh)
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            layout[f".*{name}"] = ("model",)
        distribution = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    with distribution.scope():
        yield


def filled_up(case: Case) -> dict[str, np.ndarray]:
    """The call's arguments, of all parts in one array with an axis for the replicas."""
    shapes = [part.shape for part in case.parts]
    full = tuple(max(sizes) for sizes in zip(*shapes, strict=True))

    def fill(arrays: list[Any], shape: tuple[int, ...], value: Any) -> np.ndarray:
        result = np.full((len(arrays), *shape), value, arrays[0].dtype)
        for replica, array in enumerate(arrays):
            result[(replica, *map(slice, array.shape))] = array
        return result

    values = {"x": fill(case.parts, full, np.nan), "dy": fill(case.cotangents, full, np.nan)}
    if case.masks is not None:
        values["mask"] = fill(case.masks, full[:-1], False)
    elements = np.delete(full, case.axis)
    if len({*shapes}) == 1:
        if case.weights is not None:
            values["weights"] = np.stack(case.weights)
        return values
    weights = []
    for replica, shape in enumerate(shapes):
        own = np.delete(shape, case.axis)
        weight = np.ones((), np.float32)
        if case.weights is not None:
            weight = np.asarray(case.weights[replica])
            weight = weight.reshape(-1, *(1,) * (len(own) - 1)) if weight.ndim == 1 else weight
        weights.append(np.broadcast_to(weight, own))
    values["weights"] = fill(weights, tuple(elements), 0.0)
    return values


def _compiled(function: Any, mode: str) -> Any:
    return jax.jit(function) if mode == "graph" else function


def _on_one_device(step: Any, state: State, values: dict[str, np.ndarray], mode: str) -> Any:
    values = {name: jax.numpy.asarray(value[0]) for name, value in values.items()}
    y, dx, of_weights, others = _compiled(step, mode)(state, **values)
    return y[None], dx[None], of_weights, others


def _in_shard_map(
    step: Any, state: State, values: dict[str, np.ndarray], mode: str, *, checked: bool = True
) -> Any:
    """With `check_vma` the gradients of weights are sums, and the state is known to be the same."""

    def body(state: State, values: dict[str, Any]) -> Any:
        y, dx, *rest = step(state, **{name: value[0] for name, value in values.items()})
        return y[None], dx[None], *(rest if checked else jax.tree.map(lambda v: v[None], rest))

    parts = PartitionSpec("data")
    rest = PartitionSpec() if checked else parts
    mapped = jax.shard_map(
        body,
        mesh=Mesh(np.array(jax.devices()[: len(values["x"])]), ("data",)),
        in_specs=(PartitionSpec(), parts),
        out_specs=(parts, parts, rest, rest),
        check_vma=checked,
    )
    return _compiled(mapped, mode)(state, values)


def _in_unchecked_shard_map(*arguments: Any) -> Any:
    return _in_shard_map(*arguments, checked=False)


def _in_pmap(step: Any, state: State, values: dict[str, np.ndarray], mode: str) -> Any:
    del mode  # it always compiles
    mapped = jax.pmap(lambda state, values: step(state, **values), "data", in_axes=(None, 0))
    return mapped(state, values)


def _in_vmap(step: Any, state: State, values: dict[str, np.ndarray], mode: str) -> Any:
    mapped = jax.vmap(
        lambda state, values: step(state, **values), in_axes=(None, 0), axis_name="data"
    )
    return _compiled(mapped, mode)(state, {n: jax.numpy.asarray(v) for n, v in values.items()})


def _distributed(step: Any, state: State, values: dict[str, np.ndarray], mode: str) -> Any:
    """The whole batch, in parts on the devices, as Keras's trainer hands it over."""
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    replicas = len(values["x"])
    whole = {
        name: jax.device_put(
            value.reshape(-1, *value.shape[2:]), NamedSharding(mesh, PartitionSpec("batch"))
        )
        for name, value in values.items()
    }
    y, dx, *rest = _compiled(step, mode)(state, **whole)
    return *(v.reshape(replicas, -1, *v.shape[1:]) for v in (y, dx)), *rest


_RUNS = {
    "one": _on_one_device,
    "shard_map": _in_shard_map,
    "shard_map unchecked": _in_unchecked_shard_map,
    "pmap": _in_pmap,
    "vmap": _in_vmap,
    "data parallel": _distributed,
    "model parallel": _distributed,
}


def _observed(case: Case, layer: Any, y: Any, dx: Any, of_weights: Any, others: Any) -> Observed:
    replicas, channels = len(case.parts), len(case.gamma)

    def cut(value: Any) -> list[np.ndarray]:
        pairs = zip(np.asarray(value), case.parts, strict=True)
        return [whole[tuple(map(slice, part.shape))] for whole, part in pairs]

    def gradients_of(variable: Any) -> list[np.ndarray]:
        names = [v.path for v in layer.trainable_variables]
        if variable is None or variable.path not in names:
            return [np.zeros(channels)] * replicas
        gradient = np.asarray(of_weights[names.index(variable.path)])
        if gradient.ndim == 2:
            return [*gradient]
        # The sum over all replicas, which all of them have.
        return [gradient, *[np.zeros_like(gradient)] * (replicas - 1)]

    def state_of(variable: Any) -> list[np.ndarray]:
        names = [v.path for v in layer.non_trainable_variables]
        value = others[names.index(variable.path)]
        # Where JAX does not know that it is the same on all replicas, each has returned its own.
        return [*np.asarray(value)] if value.ndim > len(variable.shape) else copies(value, replicas)

    return Observed(
        cut(y),
        cut(dx),
        gradients_of(layer.gamma),
        gradients_of(layer.beta),
        state_of(layer.moving_mean),
        state_of(layer.moving_variance),
        # A step moves no weight that is trained.
        {v.name: [np.asarray(v.value)] * replicas for v in layer.trainable_variables}
        | {v.name: state_of(v) for v in layer.non_trainable_variables},
    )


def copies(value: Any, replicas: int) -> list[np.ndarray]:
    """What each replica holds, by its device's memory, whatever JAX takes it for."""
    # Split over another axis, each place on it has copies of its own.
    by_place: dict[int, list[np.ndarray]] = {}
    for shard in value.addressable_shards:
        place = shard.index[0].start or 0 if shard.index else 0
        by_place.setdefault(place, []).append(np.asarray(shard.data))
    places = [by_place[start] for start in sorted(by_place)]
    held = places[0]
    if len(places) > 1:
        held = [np.concatenate(parts) for parts in zip(*places, strict=True)]
    return held if len(held) == replicas else held[:1] * replicas
