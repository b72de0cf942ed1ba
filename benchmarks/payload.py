"""What a layer hands to collectives, read from the graph of a step, and what the contract says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

__all__ = ["Collective", "Payload", "contract", "payload", "require"]


class Collective(NamedTuple):
    """What one replica hands to one collective."""

    dtype: str
    elements: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * int(tf.as_dtype(self.dtype).size)


class Payload(NamedTuple):
    """The collectives of a layer and step on one replica."""

    forward: tuple[Collective, ...]
    backward: tuple[Collective, ...]

    def describe(self) -> dict[str, Any]:
        """For JSON: how many, and how many bytes together, each way."""
        return {
            f"{way}_{what}": value
            for way, found in self._asdict().items()
            for what, value in (
                ("collectives", len(found)),
                ("bytes", sum(c.size for c in found)),
                ("types", sorted({c.dtype for c in found})),
            )
        }


def contract(channels: int, replicas: int) -> Payload:
    """Forward 2C+1 float64, backward 2C float32; nothing where there is nobody else."""
    if replicas == 1:
        return Payload((), ())
    return Payload(
        (Collective("float64", 2 * channels + 1),), (Collective("float32", 2 * channels),)
    )


def require(found: Payload, expected: Payload, where: str) -> None:
    """Compare a graph with what was predicted of it.

    Raises:
        RuntimeError: they differ.
    """
    if found != expected:
        raise RuntimeError(
            f"The contract requires of {where}: {expected}. The graph has: {found}. "
            "Correct the layer, or the contract."
        )


def payload(strategy: Any, layer: Any, channels: int) -> Payload:
    """Trace a training step of the layer on [4, 3, 3, C] and read its collectives.

    Raises:
        RuntimeError: the replicas do not all have the same collectives.
    """
    with strategy.scope():
        layer.build((None, 3, 3, channels))
    x = strategy.experimental_distribute_values_from_function(
        lambda _: tf.constant(np.ones((4, 3, 3, channels), np.float32))
    )

    def forward(x: Any) -> Any:
        return layer(x, training=True)

    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.gradient(y, [x, layer.gamma.value, layer.beta.value], output_gradients=y)

    replicas = strategy.num_replicas_in_sync
    one_way, both = (_collectives(strategy, function, x, replicas) for function in (forward, step))
    if one_way - both:
        raise RuntimeError(f"The step lacks collectives of its own forward: {one_way - both}.")
    return Payload(*(tuple(sorted(found.elements())) for found in (one_way, both - one_way)))


def _collectives(
    strategy: Any, run: Callable[[Any], Any], x: Any, replicas: int
) -> Counter[Collective]:
    """Of one replica, from the graph of the function and of those that it calls."""

    def on_all(x: Any) -> Any:
        return strategy.run(run, args=(x,))

    function = tf.function(on_all, autograph=False)
    graph = function.get_concrete_function(x).graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    counts = Counter(
        # A reduction's output has the shape of its input.
        Collective(
            tf.as_dtype(node.attr["T"].type).name,
            math.prod(dim.size for dim in node.attr["_output_shapes"].list.shape[0].dim),
        )
        for node in nodes
        if node.op.startswith(("Collective", "Nccl"))
    )
    uneven = {found: count for found, count in counts.items() if count % replicas}
    if uneven or any(found.elements < 0 for found in counts):
        raise RuntimeError(
            f"Each of {replicas} replicas has to have the same collectives, of known sizes. "
            f"Found in the graph: {dict(counts)}."
        )
    return Counter({found: count // replicas for found, count in counts.items()})
