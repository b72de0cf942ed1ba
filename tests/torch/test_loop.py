"""The loop of `syncbn train`: two processes end at the weights of one."""

import numpy as np
import pytest
from tests.loops import largest_difference, trained
from tests.replicas.torch import POOL
from torch import distributed


def part(*arguments):
    """What one of the processes ends with."""
    return trained(distributed.group.WORLD, *arguments)


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


def test_the_loss_may_be_scaled_as_far_as_on_one_device():
    """Gradients that a process multiplies by the number of processes overflow half a scale before.

    By powers of two up to where one device skips steps too.
    """
    start = trained(None, "reference", "mixed_float16", 0)
    kernels = []
    for exponent in range(15, 25):
        reference = trained(None, "reference", "mixed_float16", None, 2.0**exponent)
        first, _ = by_two("sync", "mixed_float16", None, 2.0**exponent)
        assert largest_difference(first, reference) < 1e-3, exponent
        kernels.append(reference[0])
    assert largest_difference(kernels[:1], start[:1]) > 1e-3
    assert largest_difference(kernels[-1:], start[:1]) == 0


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
