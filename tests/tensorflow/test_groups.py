"""Groups of replicas normalize by themselves; the moving statistics are those of all."""

import numpy as np
import pytest
import tensorflow as tf
from tests.derivatives import input_gradient_along
from tests.graphs import traced
from tests.harness import assert_close, assert_equals_one_device, make_case, observe
from tests.replicas.tensorflow import (
    local_results,
    make_layer,
    make_step,
    per_replica,
    strategy_for,
)

import syncbn
from syncbn._backends.tensorflow import collectives
from syncbn.groups import Grouping


def grouped_case(replicas, **options):
    return make_case([(5 + 3 * r, 6, 4) for r in range(replicas)])._replace(options=options)


@pytest.fixture(params=["float64 payload", "float32 table"])
def payload(request, monkeypatch):
    if request.param == "float32 table":
        monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    return request.param


PARTITIONS = [
    (4, {"group_size": 1}),
    (4, {"group_size": 2}),
    (4, {"group_size": 4}),
    (6, {"group_size": 3}),
    (3, {"group_assignment": [[2], [1, 0]]}),
    (4, {"group_assignment": [[3, 0], [1, 2]]}),
    (4, {"group_assignment": ((0,), (1,), (2, 3))}),
    (2, {"group_assignment": [[1], [0]]}),
]


@pytest.mark.usefixtures("payload")
@pytest.mark.parametrize(("replicas", "options"), PARTITIONS)
def test_each_group_normalizes_by_itself_and_the_moving_statistics_are_of_all(replicas, options):
    case = grouped_case(replicas, **options)
    # Groups far apart: a statistic of another group would be seen.
    case = case._replace(parts=[part + 3 * r for r, part in enumerate(case.parts)])
    assert_equals_one_device(case, observe(case), 5e-6)


@pytest.mark.parametrize(("replicas", "options"), PARTITIONS)
def test_one_collective_each_way_and_none_backward_for_replicas_alone(replicas, options):
    case = grouped_case(replicas, **options)
    layer = make_layer(case, strategy_for(replicas))
    assert len(traced(replicas, lambda x, _: layer(x, training=True), case)) == replicas
    groups = Grouping.of(options.get("group_size"), options.get("group_assignment")).over(replicas)
    alone = groups is not None and all(len(group) == 1 for group in groups)
    both = traced(replicas, make_step(layer), case)
    assert len(both) == (1 if alone else 2) * replicas


def test_a_nan_in_one_group_does_not_reach_the_outputs_of_another():
    case = grouped_case(4, group_size=2)
    parts = [part.copy() for part in case.parts]
    parts[3][0, 0, 0] = np.nan
    observed = observe(case._replace(parts=parts))
    expected = case.expected()
    for replica in (0, 1):
        for name in ("outputs", "input_gradients"):
            own, its = (getattr(o, name)[replica] for o in (observed, expected))
            assert_close(name, own, its, 2e-6)
    assert np.isnan(observed.outputs[2][..., 0]).all()


def test_empty_replicas_and_an_empty_group():
    case = make_case([(9, 4), (0, 4), (0, 4), (0, 4)])._replace(options={"group_size": 2})
    assert_equals_one_device(case, observe(case), 2e-6)


def test_gradients_of_gradients_stay_in_the_group():
    case = make_case([(4, 2), (3, 2), (5, 2)], dtype="float64")
    case = case._replace(options={"group_assignment": [[0, 2], [1]]})
    strategy = strategy_for(3)
    layer = make_layer(case, strategy, "float64")
    rng = np.random.default_rng(5)
    directions = [rng.normal(size=part.shape) for part in case.parts]

    def step(x, dy, u):
        with tf.GradientTape() as outer:
            outer.watch(dy)
            scalar = input_gradient_along(layer, x, dy, u)
        return outer.gradient(scalar, dy)

    arguments = [per_replica(strategy, a) for a in (case.parts, case.cotangents, directions)]
    observed = tf.function(lambda *a: strategy.run(step, args=a), autograph=False)(*arguments)
    # The map from dy to dx is linear and its own transpose: u pulled back is the dx of u.
    expected = case._replace(cotangents=directions).expected().input_gradients
    for own, its in zip(local_results(strategy, observed), expected, strict=True):
        assert_close("by dy", own, its, 1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 0}, "Received: group_size=0"),
        ({"group_size": -2}, "Received: group_size=-2"),
        ({"group_size": 1.5}, "Received: group_size=1.5"),
        ({"group_size": True}, "Received: group_size=True"),
        ({"group_size": 2, "group_assignment": [[0, 1]]}, "not both"),
        ({"group_assignment": [[0, 1], [1, 2]]}, r"replicas \[1\] more than once"),
        ({"group_assignment": [[0, 0]]}, r"replicas \[0\] more than once"),
        ({"group_assignment": [[0], []]}, "an empty group"),
        ({"group_assignment": []}, "something else than lists"),
        ({"group_assignment": [0, 1]}, "something else than lists"),
        ({"group_assignment": [[0, -1]]}, r"Received: \[-1\]"),
        ({"group_assignment": [["a"]]}, r"Received: \['a'\]"),
    ],
)
def test_what_can_be_no_partition_is_refused_when_the_layer_is_made(arguments, message):
    with pytest.raises(syncbn.InputError, match=message):
        syncbn.SyncBatchNormalization(**arguments)


@pytest.mark.parametrize(
    ("replicas", "arguments", "message"),
    [
        (3, {"group_size": 2}, "divisor of the number of replicas, 3. Received: group_size=2"),
        (2, {"group_size": 4}, "divisor of the number of replicas, 2. Received: group_size=4"),
        (1, {"group_size": 2}, "divisor of the number of replicas, 1. Received: group_size=2"),
        (2, {"group_assignment": [[0, 1], [2]]}, r"unknown replicas \[2\]"),
        (3, {"group_assignment": [[0, 1]]}, r"no group for replicas \[2\]"),
        (2, {"group_assignment": [[0], [5]]}, r"replicas \[5\] and no group for replicas \[1\]"),
    ],
)
def test_what_is_no_partition_of_these_replicas_is_refused_in_training(
    replicas, arguments, message
):
    case = grouped_case(replicas, **arguments)
    with pytest.raises(syncbn.InputError, match=message):
        observe(case)
    # In inference a model of a cluster serves anywhere.
    layer = make_layer(case, strategy_for(1))
    assert layer(case.parts[0], training=False).shape == case.parts[0].shape


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4"])
def test_a_virtual_batch_size_that_is_none_is_refused(size):
    with pytest.raises(syncbn.InputError, match="virtual_batch_size requires a number of examples"):
        syncbn.SyncBatchNormalization(virtual_batch_size=size)


@pytest.mark.parametrize(
    "other", [{"group_size": 2}, {"group_assignment": [[0, 1]]}, {"renorm": True}]
)
def test_virtual_batches_compose_with_no_other_grouping(other):
    with pytest.raises(syncbn.InputError, match="requires that it is alone"):
        syncbn.SyncBatchNormalization(virtual_batch_size=4, **other)


@pytest.mark.parametrize(
    ("shape", "axis"), [((6,), -1), ((5, 6), -1), ((6, 5), 1), ((2, 3, 6), 3), ((6, 2, 3), 1)]
)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_virtual_batches_of_any_rank_axis_and_size(shape, axis, size):
    case = make_case([(10, *shape), (7, *shape)], axis=axis, dtype="float64")
    case = case._replace(options={"virtual_batch_size": size})
    # One element alone is all cancellation.
    assert_equals_one_device(case, observe(case), 1e-9)


def test_virtual_batches_take_one_collective_for_the_moving_statistics():
    case = grouped_case(2, virtual_batch_size=4)
    layer = make_layer(case, strategy_for(2))
    assert len(traced(2, make_step(layer), case)) == 2


@pytest.mark.parametrize(("offset", "tolerance"), [(1e3, 1e-4), (1e4, 1e-3)])
def test_virtual_batches_at_a_large_mean(offset, tolerance):
    case = make_case([(512, 4), (300, 4)], offset=offset)
    case = case._replace(options={"virtual_batch_size": 64}, momentum=0.0)
    observed, expected = observe(case), case.expected()
    assert np.abs(observed.moving_variances[0] / expected.variance - 1).max() <= tolerance
    for own, its in zip(observed.outputs, expected.outputs, strict=True):
        assert_close("outputs", own, its, 2e-6)


def test_a_virtual_batch_larger_than_the_batch_is_the_batch():
    """And does not take the memory of a larger one."""
    case = make_case([(2, 16, 16, 8)])._replace(options={"virtual_batch_size": 10**6})
    assert_equals_one_device(case, observe(case), 2e-6)


def test_virtual_batches_need_examples_on_the_first_axis():
    layer = syncbn.SyncBatchNormalization(axis=0, virtual_batch_size=2)
    with pytest.raises(syncbn.InputError, match="examples on the first axis"):
        layer(tf.ones((4, 6)), training=True)
