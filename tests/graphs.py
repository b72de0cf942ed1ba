"""What is in the graph of a step: its collectives, and what its backward keeps."""

from __future__ import annotations

import tensorflow as tf

from tests.replicas.tensorflow import per_replica, strategy_for


def operations_in(graph):
    """Every operation in a GraphDef, and in the functions of its library."""
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return [node.op for node in nodes]


def collectives_of(function, *arguments):
    """Every collective in the graph of the function, and of the functions it calls."""
    graph = function.get_concrete_function(*arguments).graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return [node for node in nodes if is_collective(node.op)]


def is_collective(operation):
    return operation.startswith(("Collective", "Nccl"))


def traced(replicas, run_step, case):
    strategy = strategy_for(replicas)
    arguments = per_replica(strategy, case.parts), per_replica(strategy, case.cotangents)

    @tf.function(autograph=False)
    def function(x, dy):
        return strategy.run(run_step, args=(x, dy))

    return collectives_of(function, *arguments)


def kept_for_the_backward(step, x, dy):
    """Names of the tensors as large as x that cross from the forward graph into the backward."""
    graph = tf.function(step, autograph=False).get_concrete_function(x, dy).graph
    return {tensor.op.type for tensor in _kept(graph, x)}


def memory_kept_for_the_backward(step, x, dy):
    """The same as memory: tensors that are another one's, reshaped, count as that one.

    Returns:
        What is kept, as names of tensors; the name of x; that of the step's first output.
    """
    graph = tf.function(step, autograph=False).get_concrete_function(x, dy).graph
    kept = {_origin(tensor).name for tensor in _kept(graph, x)}
    return kept, graph.inputs[0].name, _origin(tf.nest.flatten(graph.structured_outputs)[0]).name


_SAME_MEMORY = ("EnsureShape", "Identity", "IdentityN", "PreventGradient", "Reshape")


def _origin(tensor):
    while tensor.op.type in _SAME_MEMORY:
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def _kept(graph, x):
    backward = {graph.inputs[1].op}
    for op in graph.get_operations():  # in topological order
        if any(source in backward for source in (*op.control_inputs, *(t.op for t in op.inputs))):
            backward.add(op)
    assert len(backward) > 3, "no backward found: the test looks in the wrong place"
    return [
        tensor
        for op in backward
        for tensor in op.inputs
        if tensor.op not in backward
        and (tensor.shape.num_elements() or 0) >= x.shape.num_elements()
    ]
