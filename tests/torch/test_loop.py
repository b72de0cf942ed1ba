"""The loop of `syncbn train`: two processes end at the weights of one."""

import numpy as np
import pytest
from tests.loops import largest_difference, trained
from tests.replicas.torch import POOL
from torch import distributed


def part(norm, policy, infinite=None):
    """What one of the processes ends with."""
    return trained(distributed.group.WORLD, norm, policy, infinite)


def by_two(*arguments):
    return POOL.run(part, [arguments, arguments])


# Keras's Dense computes in float32 in any case; a rounding of half precision is 5e-4.
@pytest.mark.parametrize(("policy", "bound"), [("float64", 1e-6), ("mixed_float16", 1e-3)])
def test_uneven_and_empty_parts_train_to_one_device_with_loss_scaling_too(policy, bound):
    reference = trained(None, "reference", policy)
    first, second = by_two("sync", policy)
    assert largest_difference(first, reference) < bound
    for own, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(own, other)


def test_local_statistics_end_elsewhere():
    """The comparison can fail. The last batch leaves the second process nothing: NaN to Keras."""
    reference = trained(None, "reference", "float64")
    first, _ = by_two("local", "float64")
    assert not largest_difference(first, reference) <= 1e-2


def test_an_overflow_in_one_process_skips_the_step_in_both():
    before = trained(None, "sync", "mixed_float16", infinite=0)
    first, second = by_two("local", "mixed_float16", 11)  # in the part of the second
    for own, other, start in zip(first[:2], second[:2], before[:2], strict=True):
        np.testing.assert_array_equal(own, start)
        np.testing.assert_array_equal(other, start)
