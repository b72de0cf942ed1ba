"""The layer on the replicas of a `tf.distribute` strategy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from syncbn._backends.tensorflow.replicas import (
    make_virtual_devices,
    mirrored_strategy,
    one_device_strategy,
)
from tests.harness import Case, Observed
from tests.which_keras import SyncBatchNormalization, framework_variable, keras, name_of


def start() -> None:
    """Prepare the process, once."""
    make_virtual_devices(8)


def strategy_for(replicas: int) -> Any:
    return one_device_strategy() if replicas == 1 else mirrored_strategy(replicas)


def per_replica(strategy: Any, arrays: list[Any]) -> Any:
    """A value that is another tensor on every replica."""
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(arrays[context.replica_id_in_sync_group])
    )


def local_results(strategy: Any, value: Any) -> list[np.ndarray]:
    return [part.numpy() for part in strategy.experimental_local_results(value)]


def make_layer(case: Case, strategy: Any, dtype: str = "float32", **arguments: Any) -> Any:
    """A layer in the strategy's scope, built for any size and holding the case's weights.

    With `state`, values by name, the weights of those names hold these instead.
    """
    layer_class = arguments.pop("layer_class", SyncBatchNormalization)
    state = arguments.pop("state", None) or {}
    with strategy.scope():
        layer = layer_class(
            axis=case.axis,
            epsilon=case.epsilon,
            momentum=case.momentum,
            gamma_initializer=keras.initializers.Constant(1.0),
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
            if name_of(weight) in state:
                weight.assign(state[name_of(weight)])
    return layer


def make_step(layer: Any, training: bool = True) -> Any:
    """A function for strategy.run: outputs, and the gradients of x, gamma and beta by dy."""

    def step(x: Any, dy: Any, **call_arguments: Any) -> Any:
        # Before Keras 3.5 the attribute is missing without the weight.
        weights = [getattr(layer, name, None) for name in ("gamma", "beta")]
        weights = [framework_variable(w) for w in weights if w is not None]
        with tf.GradientTape() as tape:
            tape.watch([x, *weights])  # of a frozen layer no tape watches the weights itself
            y = layer(x, training=training, **call_arguments)
        dx, *of_weights = tape.gradient(y, [x, *weights], output_gradients=tf.cast(dy, y.dtype))
        return y, dx, of_weights

    return step


class Prepared(NamedTuple):
    strategy: Any
    layer: Any
    run: Any  # a function of the values, by name
    values: dict[str, Any]  # one tensor a replica each


def prepare(
    case: Case,
    *,
    strategy: Any = None,
    dtype: str | None = None,
    mode: str = "graph",
    training: bool = True,
    unknown_sizes: bool = True,
    **arguments: Any,
) -> Prepared:
    """A training step of the layer on as many replicas as the case has parts.

    Args:
        case: data and weights.
        strategy: where; that of this process for so many replicas by default.
        dtype: the layer's policy; the data's own by default.
        mode: "graph", or "eager" without any tf.function.
        training: what the layer is called with.
        unknown_sizes: trace for any size of every axis but the channels'.
        **arguments: of the layer; `state`, of `make_layer`.
    """
    strategy = strategy or strategy_for(len(case.parts))
    layer = make_layer(case, strategy, dtype or case.parts[0].dtype.name, **arguments)
    step = make_step(layer, training)
    values = {"x": case.parts, "dy": case.cotangents, "mask": case.masks, "weights": case.weights}
    values = {name: per_replica(strategy, v) for name, v in values.items() if v is not None}

    def run(**values: Any) -> Any:
        return strategy.run(step, kwargs=values)

    if mode == "graph":
        run = tf.function(run, autograph=False)
        if unknown_sizes and len(case.parts) > 1:
            axis = case.axis % case.parts[0].ndim
            run = run.get_concrete_function(
                **{n: any_size(v, axis if n in ("x", "dy") else None) for n, v in values.items()}
            )
    return Prepared(strategy, layer, run, values)


def observe(case: Case, **arguments: Any) -> Observed:
    """What the replicas of this process see in the step that `prepare` describes."""
    return take(prepare(case, **arguments))


def take(prepared: Prepared) -> Observed:
    """Take the step."""
    strategy, layer, run, values = prepared
    y, dx, of_weights = run(**values)
    gradients = [local_results(strategy, gradient) for gradient in of_weights]
    channels = layer.moving_mean.shape[0]
    if not layer.center:
        gradients.append([np.zeros(channels)])
    if not layer.scale:
        gradients.insert(0, [np.zeros(channels)])
    return Observed(
        local_results(strategy, y),
        local_results(strategy, dx),
        *gradients,
        local_results(strategy, framework_variable(layer.moving_mean)),
        local_results(strategy, framework_variable(layer.moving_variance)),
        {
            name_of(weight): local_results(strategy, framework_variable(weight))
            for weight in layer.weights
        },
    )


def any_size(value: Any, axis: int | None) -> Any:
    """The spec of a per-replica value with only its rank and its channels' axis known."""
    from tensorflow.python.distribute.values import PerReplicaSpec

    def spec(tensor: Any) -> Any:
        shape: list[int | None] = [None] * tensor.shape.rank
        if axis is not None:
            shape[axis] = tensor.shape[axis]
        return tf.TensorSpec(shape, tensor.dtype)

    return PerReplicaSpec(*(spec(tensor) for tensor in value.values))
