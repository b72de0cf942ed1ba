"""Every kernel keeps the contract, whichever of them is chosen for a size."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tests.harness import assert_equals_one_device, make_case, observe
from tests.replicas.tensorflow import make_layer

from syncbn._backends.tensorflow import compiled, kernels, normalization, xla
from syncbn._backends.tensorflow.composed import composed
from syncbn._backends.tensorflow.fused import fused

KERNELS = {"composed": composed, "compiled": compiled.compiled, "fused": fused}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels.json"


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """The one that the layer takes, whatever the size."""
    monkeypatch.setattr(normalization, "kernel_for", lambda *_: KERNELS[request.param])
    return request.param


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("unknown_sizes", [True, False], ids=["unknown sizes", "known sizes"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_uneven_and_empty_parts(unknown_sizes, offset):
    case = make_case([(29, 7, 5), (0, 7, 5), (1, 7, 5)], offset=offset)
    # At a mean of 1e3 the inputs themselves are rounded to 6e-5 of a standard deviation.
    observed = observe(case, unknown_sizes=unknown_sizes)
    assert_equals_one_device(case, observed, 2e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("width", ["positions", "examples"])
def test_masks_and_fractional_weights(width):
    case = make_case([(31, 6, 5), (12, 6, 5)])
    rng = np.random.default_rng(3)
    shapes = [part.shape[: 1 if width == "examples" else 2] for part in case.parts]
    weights = [rng.random(s).astype("f4") * (rng.random(s) > 0.4) for s in shapes]
    case = case._replace(weights=weights)
    assert_equals_one_device(case, observe(case, unknown_sizes=False), 2e-6)


@pytest.mark.usefixtures("kernel")
def test_a_masked_nan_touches_nothing():
    case = make_case([(31, 6, 5), (12, 6, 5)])
    masks = [np.random.default_rng(3).random(part.shape[:-1]) > 0.4 for part in case.parts]
    case = case._replace(masks=masks)
    clean = observe(case, unknown_sizes=False)
    poisoned = [
        np.where(mask[..., None], part, np.nan).astype("f4")
        for mask, part in zip(masks, case.parts, strict=True)
    ]
    observed = observe(case._replace(parts=poisoned), unknown_sizes=False)
    for name in ("input_gradients", "gamma_gradients", "beta_gradients", "moving_variances"):
        for own, its in zip(getattr(observed, name), getattr(clean, name), strict=True):
            np.testing.assert_array_equal(own, its)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("weighted", [False, True])
def test_from_the_output_behind_an_activation_with_gammas_of_both_signs(weighted):
    case = make_case([(40, 7, 5), (9, 7, 5)])
    rng = np.random.default_rng(3)
    if weighted:
        case = case._replace(weights=[rng.choice([0, 0.5, 2], len(p)) for p in case.parts])
    options = {"save": "output", "activation": "leaky_relu"}
    case = case._replace(gamma=case.gamma * [1, -1, -1, 1, -1], options=options)
    assert_equals_one_device(case, observe(case, unknown_sizes=False), 2e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision_is_rounded_once(dtype, tolerance):
    case = make_case([(40, 5, 3), (9, 5, 3)], dtype=dtype)
    observed = observe(case, dtype=f"mixed_{dtype}", unknown_sizes=False)
    assert_equals_one_device(case, observed, tolerance)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("axis", [1, 2])
def test_any_axis(axis):
    shape = [6, 7, 8]
    shape[axis] = 3
    case = make_case([tuple(shape)] * 2, axis=axis)
    assert_equals_one_device(case, observe(case, unknown_sizes=False), 2e-6)


@pytest.mark.parametrize("broken", ["rest", "second sum"])
def test_a_compiled_kernel_that_leaves_something_out_is_noticed(broken, monkeypatch):
    """The negative control of the tests above."""
    monkeypatch.setattr(normalization, "kernel_for", lambda *_: compiled.compiled)
    strips_of = compiled._strips_of

    def without(pairs):
        strips, rest = strips_of(pairs)
        if broken == "rest":
            return strips, tf.zeros_like(rest)
        return tf.complex(tf.math.real(strips), tf.zeros_like(tf.math.real(strips))), rest

    monkeypatch.setattr(compiled, "_strips_of", without)
    xla._traced.cache_clear()
    try:
        case = make_case([(29, 7, 5), (1, 7, 5)])
        with pytest.raises(AssertionError, match="off by"):
            assert_equals_one_device(case, observe(case, unknown_sizes=False), 2e-6)
    finally:
        xla._traced.cache_clear()


def chosen(shape, axis=-1, dtype="float32"):
    """The kernel for inputs of this shape, as a placeholder has it."""
    kernel = kernels.kernel_for(tf.TensorSpec(shape, dtype), axis)
    return next(name for name, one in KERNELS.items() if one is kernel)


def in_graph(function):
    with tf.Graph().as_default():
        return function()


@pytest.mark.parametrize("result", json.loads(RESULTS.read_text())["results"], ids=str)
def test_the_choice_is_within_a_quarter_of_the_best_that_was_measured(result):
    speeds = {name: one["times_as_fast_as_fused"] for name, one in result["variants"].items()}
    name = in_graph(lambda: chosen(tuple(result["shape"])))
    assert speeds[name] >= max(speeds.values()) / 1.25


def test_what_varies_is_not_compiled_again_and_again(monkeypatch):
    assert in_graph(lambda: chosen((16, 56, 56, 64))) == "compiled"
    assert in_graph(lambda: chosen((None, 56, 56, 64))) == "compiled"
    assert in_graph(lambda: chosen((None, 14, 14, 256))) == "fused"  # as regions of a detector
    assert in_graph(lambda: chosen((None, 512))) == "fused"
    assert in_graph(lambda: chosen((64, None, 128))) == "fused"
    assert in_graph(lambda: chosen((64, 128))) == "composed"
    assert chosen((16, 56, 56, 64)) == "fused"  # eager
    assert chosen((16, 56, 56, 64), dtype="float64") == "composed"
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["it"] * (kind == "TPU"))
    assert in_graph(lambda: chosen((16, 56, 56, 64))) == "fused"


@pytest.mark.usefixtures("kernel")
def test_functions_may_run_eagerly():
    """TensorFlow's switch for debugging: more rows than a sample has."""
    case = make_case([(300, 3)])
    tf.config.run_functions_eagerly(True)
    try:
        assert_equals_one_device(case, observe(case, mode="eager"), 2e-6)
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.usefixtures("kernel")
def test_deviations_whose_squares_overflow_leave_beta():
    case = make_case([(40, 3)])
    case = case._replace(parts=[case.parts[0] * np.float32(1e20)])
    observed = observe(case, unknown_sizes=False)
    assert np.isfinite(observed.outputs[0]).all()
    assert np.isfinite(observed.moving_means[0]).all()


def test_a_second_tape_makes_a_compiled_pass_return_no_more():
    def outputs_of_the_largest_call():
        graph = tf.function(passes).get_concrete_function(tf.TensorSpec((50, 3))).graph
        calls = [op for op in graph.get_operations() if "PartitionedCall" in op.type]
        return max(len(call.outputs) for call in calls)

    def passes(x):
        with tf.GradientTape() as one, tf.GradientTape() as other:
            one.watch(x)
            other.watch(x)
            return compiled.compiled.moments(tf.reshape(x, (50, 1, 1, 3)), None, tf.float64)

    assert outputs_of_the_largest_call() <= 4


def test_one_function_of_python_serves_every_number_of_rows():
    """Or each new size of a batch would be traced too, and TensorFlow would warn."""
    case = make_case([(4, 2)])
    layer = make_layer(case, tf.distribute.get_strategy())
    xla._traced.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalization, "kernel_for", lambda *_: compiled.compiled)
        layer(np.ones((3, 2), "f4"), training=True)
        made = xla._traced.cache_info().currsize
        assert made > 0
        layer(np.ones((50, 2), "f4"), training=True)
        assert xla._traced.cache_info().currsize == made
