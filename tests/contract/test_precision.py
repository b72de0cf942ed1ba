"""Contract 1 at large means, of many elements and in low precision."""

import numpy as np
import pytest
from tests.harness import (
    MERGES_IN_FLOAT32,
    assert_close,
    assert_equals_one_device,
    assert_statistics,
    assert_variance_at_a_large_mean,
    dtype_of,
    make_case,
    numbers,
    observe,
    whole_numbers_at_a_large_mean,
)
from tests.which_keras import keras


@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 2e-6), (1e3, 1e-4), (1e4, 1e-3)])
def test_variance_at_a_large_mean(offset, tolerance):
    assert_variance_at_a_large_mean(offset, tolerance)


def test_normalization_at_a_large_mean_keeps_the_digits_of_the_input():
    case = whole_numbers_at_a_large_mean()
    # Far less than the distance of two float32 numbers at this mean, 5e-4; on JAX, which has no
    # float64 to keep a mean in, half of that distance, in standard deviations.
    tolerance = 1.4e-4 if keras.backend.backend() in MERGES_IN_FLOAT32 else 2e-6
    observed, expected = observe(case), case.expected()
    for own, its in zip(observed.outputs, expected.outputs, strict=True):
        assert_close("outputs", own, its, tolerance)


@pytest.mark.parametrize("shapes", [[(16, 112, 112, 4)], [(8, 256, 256, 3), (3, 256, 256, 3)]])
def test_many_elements_do_not_wear_out_a_float32_sum(shapes):
    """Two hundred thousand elements a channel and more; one running sum is 1e-5 off."""
    case = make_case(shapes)
    assert_equals_one_device(case, observe(case), 2e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_many_examples_do_not_wear_out_a_float32_sum(weighted):
    """Fifty thousand elements a channel in examples of two hundred; one running sum is 6e-6 off."""
    case = make_case([(256, 14, 14, 32)])
    if weighted:
        case = case._replace(weights=[np.random.default_rng(1).random(256).astype("f4")])
    # Relative to a mean of 0.006: 1e-8 of a standard deviation.
    assert_equals_one_device(case, observe(case), 4e-6 if weighted else 2e-6)


# Unit roundoff of the dtype, times a few: outputs and gradients are rounded once to it.
HALF = {"float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("policy", ["mixed", "pure"])
def test_half_precision_keeps_statistics_in_float32(dtype, policy):
    case = make_case([(33, 5, 4), (32, 5, 4)], dtype=dtype)
    observed = observe(case, dtype=f"mixed_{dtype}" if policy == "mixed" else dtype)
    expected = case.expected()
    for name in ("outputs", "input_gradients"):
        for own, its in zip(getattr(observed, name), getattr(expected, name), strict=True):
            assert own.dtype == dtype_of(dtype)
            assert_close(name, own, its, HALF[dtype])
    if policy == "mixed":
        # The weights are float32, and so the moving statistics show the precision they had.
        assert_statistics(case, observed, 2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_common_part_of_the_cotangent_does_not_drown_the_gradient(dtype):
    # dx has no part of what all cotangents of a channel share; rounding before that part is taken
    # away would leave little but rounding.
    case = make_case([(33, 4), (32, 4)], dtype=dtype)
    case = case._replace(cotangents=[c + np.array(16, c.dtype) for c in case.cotangents])
    observed = observe(case, dtype=f"mixed_{dtype}")
    for own, its in zip(observed.input_gradients, case.expected().input_gradients, strict=True):
        assert_close("input gradients", own, its, HALF[dtype])


def test_a_float64_layer_takes_float32_inputs():
    case = make_case([(33, 4), (32, 4)])
    observed = observe(case, dtype="float64")
    assert observed.outputs[0].dtype == np.float64
    for own, its in zip(observed.outputs, case.expected().outputs, strict=True):
        assert_close("outputs", own, its, 1e-11)


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_float16_inputs_up_to_the_largest_stay_finite_where_one_device_would(replicas, policy):
    """Their squares are beyond float16; their mean is not, nor anything that leaves the layer."""
    rng = np.random.default_rng(0)
    case = make_case([(33, 5, 4), (32, 5, 4)][:replicas], dtype="float16")
    parts = [rng.uniform(-6e4, 6e4, part.shape).astype("float16") for part in case.parts]
    parts[0][..., 0] = 6e4  # a constant channel, at the end of the range
    case = case._replace(parts=parts)
    observed, expected = observe(case, dtype=policy), case.expected()
    for own, its in zip(observed.outputs, expected.outputs, strict=True):
        assert_close("outputs", own, its, HALF["float16"])
    assert all(np.isfinite(dx).all() for dx in observed.input_gradients)
    assert np.isfinite(observed.moving_means[0]).all()
    if policy == "mixed_float16":
        assert_statistics(case, observed, 2e-6)
    else:
        # A float16 variable cannot hold a variance of 1e9, on one device no more than here.
        layer = keras.layers.BatchNormalization(momentum=0.9, dtype="float16")
        layer(np.concatenate(parts), training=True)
        np.testing.assert_array_equal(
            np.isfinite(observed.moving_variances[0]), np.isfinite(numbers(layer.moving_variance))
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_scaled_loss_gives_scaled_gradients(dtype):
    """Loss scaling: cotangents near the end of float16's range, sums of them beyond it."""
    scale = 2.0**13
    case = make_case([(33, 5, 4), (32, 5, 4)], dtype=dtype)
    scaled = case._replace(cotangents=[(c * scale).astype(c.dtype) for c in case.cotangents])
    plain, observed = (observe(c, dtype=f"mixed_{dtype}") for c in (case, scaled))
    assert np.abs(np.sum(observed.gamma_gradients, axis=0)).max() > 65504
    for name in ("gamma_gradients", "beta_gradients"):
        own, its = (np.sum(getattr(o, name), axis=0) for o in (observed, plain))
        assert_close(name, own / scale, its, 1e-6)
    for own, its in zip(observed.input_gradients, plain.input_gradients, strict=True):
        assert_close("input gradients", own.astype("f8") / scale, its, HALF[dtype])
