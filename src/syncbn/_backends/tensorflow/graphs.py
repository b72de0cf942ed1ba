"""Questions about the graph that is being traced, and the graphs around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

__all__ = [
    "in_shape_inference",
    "is_being_saved",
    "is_function_inside_a_loop",
    "tf_keras_infers_shapes",
]


def in_shape_inference() -> bool:
    """Whether Keras only computes shapes: it does so in a graph of a name of its own.

    For Keras before 3.5; later ones have `keras.SymbolicScope`.
    """
    graphs = _from_inside_out(tf.compat.v1.get_default_graph())
    return any(getattr(graph, "name", "").startswith("scratch_graph") for graph in graphs)


def tf_keras_infers_shapes() -> bool:
    """Whether tf_keras only computes shapes, while a model is made from symbolic inputs."""
    graphs = _from_inside_out(tf.compat.v1.get_default_graph())
    return any(getattr(graph, "name", "").endswith("_scratch_graph") for graph in graphs)


def is_being_saved() -> bool:
    """Whether the graph being traced goes into a SavedModel, and nowhere else."""
    from tensorflow.python.saved_model.save_context import in_save_context

    return bool(in_save_context())


def is_function_inside_a_loop(graph: Any) -> bool:
    """Whether this graph belongs to a tf.function that a tf.cond or tf.while_loop calls."""
    within_function = False
    for enclosing in _from_inside_out(graph):
        is_control_flow = getattr(enclosing, "is_control_flow_graph", False)
        if within_function and is_control_flow:
            return True
        within_function = within_function or not is_control_flow
    return False


def _from_inside_out(graph: Any) -> Iterator[Any]:
    while graph is not None:
        yield graph
        graph = getattr(graph, "outer_graph", None)
