"""Groups of replicas normalize by themselves; the moving statistics are those of all."""

import numpy as np
import pytest
from keras import ops
from tests.harness import (
    PARTITIONS,
    assert_close,
    assert_equals_one_device,
    grouped_case,
    make_case,
    observe,
)
from tests.which_keras import SyncBatchNormalization

import syncbn


@pytest.mark.parametrize(("replicas", "options"), PARTITIONS)
def test_each_group_normalizes_by_itself_and_the_moving_statistics_are_of_all(replicas, options):
    case = grouped_case(replicas, **options)
    # Groups far apart: a statistic of another group would be seen.
    case = case._replace(parts=[part + 3 * r for r, part in enumerate(case.parts)])
    assert_equals_one_device(case, observe(case), 5e-6)


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
    layer = SyncBatchNormalization(**arguments)
    assert layer(case.parts[0], training=False).shape == case.parts[0].shape


@pytest.mark.parametrize(
    ("shape", "axis", "size"),
    [
        ((6,), -1, 1),
        ((6,), -1, 4),
        ((5, 6), -1, 4),
        ((6, 5), 1, 1),
        ((6, 5), 1, 4),
        ((2, 3, 6), 3, 4),
        ((2, 3, 6), 3, 100),
        ((6, 2, 3), 1, 100),
        ((6, 2, 3), 1, 4),
    ],
)
def test_virtual_batches_of_any_rank_axis_and_size(shape, axis, size):
    case = make_case([(10, *shape), (7, *shape)], axis=axis, dtype="float64")
    case = case._replace(options={"virtual_batch_size": size})
    # One element alone is all cancellation.
    assert_equals_one_device(case, observe(case), 1e-9)


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
    layer = SyncBatchNormalization(axis=0, virtual_batch_size=2)
    with pytest.raises(syncbn.InputError, match="examples on the first axis"):
        layer(ops.ones((4, 6)), training=True)
