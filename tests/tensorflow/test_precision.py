"""Precision in TensorFlow's own terms: by the float32 table, of unknown sizes, compiled by XLA."""

import numpy as np
import pytest
import tensorflow as tf
from tests.harness import (
    assert_close,
    assert_equals_one_device,
    assert_variance_at_a_large_mean,
    make_case,
    observe,
    whole_numbers_at_a_large_mean,
)
from tests.replicas.tensorflow import make_layer, prepare, strategy_for, take

from syncbn._backends.tensorflow import collectives


@pytest.fixture
def _table(monkeypatch):
    monkeypatch.setattr(collectives, "_has_float64", lambda: False)


@pytest.mark.usefixtures("_table")
@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 2e-6), (1e3, 1e-4), (1e4, 1e-3)])
def test_variance_at_a_large_mean_by_the_float32_table(offset, tolerance):
    assert_variance_at_a_large_mean(offset, tolerance)


@pytest.mark.usefixtures("_table")
def test_normalization_at_a_large_mean_keeps_the_digits_of_the_input_by_the_float32_table():
    case = whole_numbers_at_a_large_mean()
    observed, expected = observe(case), case.expected()
    for own, its in zip(observed.outputs, expected.outputs, strict=True):
        assert_close("outputs", own, its, 5e-6)


@pytest.mark.parametrize("shapes", [[(16, 112, 112, 4)], [(8, 256, 256, 3), (3, 256, 256, 3)]])
def test_many_elements_of_known_sizes_do_not_wear_out_a_float32_sum(shapes):
    case = make_case(shapes)
    assert_equals_one_device(case, observe(case, unknown_sizes=False), 2e-6)


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
