"""Parallel branches: the collectives have one order on every replica, forward and backward.

Three such layers in parallel hung NCCL for years (tensorflow#42111): each replica launched them in
an order of its own. TensorFlow runs what has no edge between it in any order, so there must be one.
"""

import collections
import itertools

import keras
import pytest
import tensorflow as tf
from tests.replicas.tensorflow import per_replica, strategy_for

import syncbn

BRANCHES = 8
# Branches of different widths, so that a collective says by its payload which it is.
WIDTHS = range(3, 3 + BRANCHES)


def graph_of_branches(replicas):
    """Forward and backward of a model of parallel branches, as one graph."""
    strategy = strategy_for(replicas)
    with strategy.scope():
        inputs = keras.Input((2,))
        branches = [
            keras.layers.Dense(1)(
                syncbn.SyncBatchNormalization(activation="relu")(keras.layers.Dense(width)(inputs))
            )
            for width in WIDTHS
        ]
        model = keras.Model(inputs, keras.layers.Add()(branches))

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 3)
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    x = per_replica(strategy, [tf.random.normal((5 + r, 2)) for r in range(replicas)])
    run = tf.function(lambda x: strategy.run(step, args=(x,)), autograph=False)
    return run.get_concrete_function(x).graph


def launches_by_device(graph):
    devices = collections.defaultdict(list)
    for op in graph.get_operations():
        if op.type.startswith("Collective"):
            devices[op.device].append(op)
    return devices


def precedes(first, second, control=True):
    """Whether TensorFlow must have run the first before it may run the second."""
    waiting, seen = [second], {second}
    while waiting:
        op = waiting.pop()
        if op is first:
            return True
        before = [tensor.op for tensor in op.inputs] + (list(op.control_inputs) if control else [])
        waiting += [other for other in before if other not in seen]
        seen.update(before)
    return False


def is_ordered(operations, control=True):
    pairs = itertools.pairwise(operations)
    return all(precedes(first, second, control) for first, second in pairs)


def payloads(operations):
    return [(op.inputs[0].dtype.name, op.inputs[0].shape[0]) for op in operations]


@pytest.fixture(scope="module", params=[2, 4])
def launches(request):
    found = launches_by_device(graph_of_branches(request.param))
    assert len(found) == request.param
    return list(found.values())


def test_every_replica_launches_the_collectives_of_branches_in_the_same_order(launches):
    for operations in launches:
        assert len(operations) == 2 * BRANCHES
        assert is_ordered(operations)
        assert payloads(operations) == payloads(launches[0])


def test_each_branch_is_launched_once_forward_and_once_backward(launches):
    forward = sorted(size for dtype, size in payloads(launches[0]) if dtype == "float64")
    backward = sorted(size for dtype, size in payloads(launches[0]) if dtype == "float32")
    assert forward == [2 * width + 1 for width in WIDTHS]
    assert backward == [2 * width for width in WIDTHS]


def test_by_their_data_alone_branches_have_no_order(launches):
    """The control: without the edges that are made for order, the check fails."""
    assert not is_ordered(launches[0], control=False)
