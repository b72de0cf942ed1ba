"""Contract 1 at large means and in low precision, also by the float32 table."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.harness import (
    assert_close,
    assert_equals_one_device,
    assert_statistics,
    make_case,
    observe,
)
from tests.replicas.tensorflow import make_layer, prepare, strategy_for, take

from syncbn._backends.tensorflow import collectives


@pytest.fixture(params=["float64 payload", "float32 table"])
def payload(request, monkeypatch):
    if request.param == "float32 table":
        monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    return request.param


@pytest.mark.usefixtures("payload")
@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 2e-6), (1e3, 1e-4), (1e4, 1e-3)])
def test_variance_at_a_large_mean(offset, tolerance):
    # Means differ between the replicas too, so that the merge has something to merge.
    case = make_case([(512, 4), (300, 4)], offset=offset)
    case = case._replace(parts=[part + r for r, part in enumerate(case.parts)], momentum=0.0)
    variance = observe(case).moving_variances[0]
    expected = case.expected().variance
    error = np.abs(variance / expected - 1).max()
    assert error <= tolerance


def test_normalization_at_a_large_mean_keeps_the_digits_of_the_input(payload):
    # Integers and halves are exact in float32 here, so all of the error is the layer's own.
    rng = np.random.default_rng(0)
    parts = [(rng.integers(-6, 7, (size, 3)) / 2 + 4096).astype("f4") for size in (40, 24)]
    case = make_case([(40, 3), (24, 3)])._replace(parts=parts)
    observed = observe(case)
    expected = case.expected()
    for own, its in zip(observed.outputs, expected.outputs, strict=True):
        # Far less than the distance of two float32 numbers at this mean, 5e-4.
        assert_close("outputs", own, its, 2e-6 if payload == "float64 payload" else 5e-6)


@pytest.mark.parametrize("shapes", [[(16, 112, 112, 4)], [(8, 256, 256, 3), (3, 256, 256, 3)]])
@pytest.mark.parametrize("unknown_sizes", [True, False], ids=["unknown sizes", "known sizes"])
def test_many_elements_do_not_wear_out_a_float32_sum(shapes, unknown_sizes):
    """Two hundred thousand elements a channel and more; one running sum is 1e-5 off."""
    case = make_case(shapes)
    assert_equals_one_device(case, observe(case, unknown_sizes=unknown_sizes), 2e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["executed", "compiled"])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown number of examples"])
def test_many_examples_do_not_wear_out_a_float32_sum(known, compiled, weighted):
    """Fifty thousand elements a channel in examples of two hundred; one running sum is 6e-6 off."""
    case = make_case([(256, 14, 14, 32)])
    if weighted:
        weights = np.random.default_rng(1).random(256).astype("f4")
        case = case._replace(weights=[weights])
    prepared = prepare(case, unknown_sizes=False)
    spec = {
        name: tf.TensorSpec((256 if known else None, *value.shape[1:]), value.dtype)
        for name, value in prepared.values.items()
    }
    run = tf.function(prepared.run.python_function, autograph=False, jit_compile=compiled)
    run = run.get_concrete_function(**spec)
    # Relative to a mean of 0.006: 1e-8 of a standard deviation.
    tolerance = 4e-6 if weighted else 2e-6
    assert_equals_one_device(case, take(prepared._replace(run=run)), tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0])
def test_compiled_by_xla_the_variance_is_as_right(offset, dtype):
    """XLA computes the fused kernel as E[x²] − E[x]²."""
    case = make_case([(512, 4)], dtype=dtype, offset=offset)._replace(momentum=0.0)
    layer = make_layer(case, strategy_for(1), "mixed_float16" if dtype == "float16" else dtype)
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True, autograph=False)
    compiled(tf.constant(case.parts[0]))
    assert_close("variance", layer.moving_variance.numpy(), case.expected().variance, 5e-6)


def test_float32_table_equals_one_device(monkeypatch):
    monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    for shapes in [[(33, 6), (32, 6)], [(40, 6), (0, 6)], [(7, 6), (0, 6), (20, 6), (1, 6)]]:
        case = make_case(shapes)
        assert_equals_one_device(case, observe(case), 2e-6)


def test_float32_table_of_an_empty_batch_moves_nothing(monkeypatch):
    monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    case = make_case([(0, 6), (0, 6)])
    assert_equals_one_device(case, observe(case), 0.0)


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
            assert own.dtype == tf.as_dtype(dtype).as_numpy_dtype
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
            np.isfinite(observed.moving_variances[0]), np.isfinite(layer.moving_variance.numpy())
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
