"""The loop of `syncbn train`: two devices end at the weights of one."""

import numpy as np
import pytest
from tests.loops import largest_difference, trained

from syncbn._backends.jax.replicas import strategy_over


def on_two(norm, policy, infinite=None):
    return trained(strategy_over(2, by_processes=False), norm, policy, infinite)


@pytest.mark.parametrize(("policy", "bound"), [("float32", 1e-5), ("mixed_float16", 1e-3)])
def test_an_indivisible_batch_trains_to_one_device_with_loss_scaling_too(policy, bound):
    reference = trained(None, "reference", policy)
    assert largest_difference(on_two("sync", policy), reference) < bound
    assert largest_difference(on_two("local", policy), reference) > 1e-2


def test_an_overflow_skips_the_step():
    before = trained(None, "sync", "mixed_float16", infinite=0)
    after = on_two("sync", "mixed_float16", infinite=11)
    for own, start in zip(after[:2], before[:2], strict=True):
        np.testing.assert_array_equal(own, start)
