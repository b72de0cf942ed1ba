"""The numbers of docs/explanation/accuracy.md, each measured again."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tests.harness import (
    assert_close,
    assert_equals_one_device,
    expected_statistics,
    make_case,
    observe,
)
from tests.replicas.tensorflow import make_layer, prepare, strategy_for, take

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "accuracy.md").read_text()
COLUMNS = ("outputs", "input gradients", "weight gradients", "moving statistics")


def table(after):
    """The rows of the first table behind a heading: a name and numbers."""
    text = PAGE.split(f"## {after}")[1]
    rows = re.findall(r"^\| (\S+) \| (.*) \|$", text.split("\n## ")[0], re.MULTILINE)
    return {
        name: [float(n) for n in numbers.split(" | ")] for name, numbers in rows if "e-" in numbers
    }


POLICIES = table("By dtype policy")
OFFSETS = table("At large means")
FROM_OUTPUT = table("From the output")


def variants(dtype):
    case = make_case([(33, 5, 6), (20, 5, 6)], dtype=dtype)
    rng = np.random.default_rng(1)
    masks = [rng.random(part.shape[:-1]) > 0.3 for part in case.parts]
    weights = [rng.uniform(0.5, 2, len(part)).astype("f4") for part in case.parts]
    options = {"renorm": True, "activation": "elu", "group_size": 1}
    return [case, case._replace(masks=masks, weights=weights), case._replace(options=options)]


def error(observed, expected):
    joined = [
        np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])
        for arrays in (observed, expected)
    ]
    return np.abs(joined[0] - joined[1]).max() / np.abs(joined[1]).max()


def errors(case, policy):
    observed, expected = observe(case, dtype=policy), case.expected()
    summed = [np.sum(np.asarray(g, np.float64), axis=0) for g in observed[2:4]]
    return (
        error(observed.outputs, expected.outputs),
        error(observed.input_gradients, expected.input_gradients),
        error(summed, [expected.gamma_gradient, expected.beta_gradient]),
        error([observed.moving_means[0], observed.moving_variances[0]], expected_statistics(case)),
    )


def test_the_page_has_a_row_for_every_policy_and_offset():
    assert set(POLICIES) == {
        *("float64", "float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16"),
    }
    assert {float(offset) for offset in OFFSETS} == {0, 1e1, 1e2, 1e3, 1e4, 1e5}


@pytest.mark.parametrize("policy", POLICIES)
def test_no_error_is_larger_than_the_page_says_nor_far_smaller(policy):
    measured = [errors(case, policy) for case in variants(policy.removeprefix("mixed_"))]
    for column, said, worst in zip(
        COLUMNS, POLICIES[policy], np.max(measured, axis=0), strict=True
    ):
        assert worst <= said, f"{column}: {worst:.1e}"
        assert worst > said / 30, f"{column}: {worst:.1e}, the page says {said}"


def errors_from_the_output(policy, ratio):
    """Of dx, by channel, and of the gradient of gamma, with gammas of both signs."""
    case = make_case([(64, 8, 8, 6)], dtype=policy.removeprefix("mixed_"))
    rng = np.random.default_rng(3)
    gamma, beta = (case.gamma * rng.choice([-1, 1], 6) for _ in range(2))
    case = case._replace(gamma=gamma, beta=beta * ratio, options={"save": "output"})
    observed, expected = observe(case, dtype=policy), case.expected()
    own, its = observed.input_gradients[0].astype("f8"), expected.input_gradients[0]
    axes = (0, 1, 2)
    by_channel = np.abs(own - its).max(axis=axes) / np.abs(its).max(axis=axes)
    return by_channel.max(), error(observed.gamma_gradients, [expected.gamma_gradient])


@pytest.mark.parametrize("policy", FROM_OUTPUT)
def test_the_errors_with_save_output_are_those_of_the_page_up_to_its_limit(policy):
    *at_one, limit, dx, of_gamma = FROM_OUTPUT[policy]
    for ratio, said in ((1, at_one), (limit, (dx, of_gamma))):
        for measured, number in zip(errors_from_the_output(policy, ratio), said, strict=True):
            assert number / 30 < measured <= number
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"at most {limit:.0f} in every"):
        errors_from_the_output(policy, limit * 1.01)


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_errors_at_large_means_are_those_of_the_page(offset, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import keras

    import accuracy
    import syncbn

    said = OFFSETS[offset]
    theirs = accuracy.errors(keras.layers.BatchNormalization, float(offset), 0, synchronized=True)
    ours = accuracy.errors(syncbn.SyncBatchNormalization, float(offset), 0)
    for measured, number in ((ours[0], said[1]), (ours[1], said[3])):
        assert measured <= 3 * number
    for measured, number in ((theirs[0], said[0]), (theirs[1], said[2])):
        assert measured >= number / 3


def test_the_limit_of_float64_on_replicas_at_large_means():
    case = make_case([(512, 4), (300, 4)], offset=1e3, dtype="float64")._replace(momentum=0.0)
    variance = observe(case).moving_variances[0]
    assert np.abs(variance / case.expected().variance - 1).max() <= 1e-9


@pytest.mark.parametrize(("known", "tolerance"), [(True, 2e-6), (False, 1e-5)])
def test_the_limit_of_very_many_examples_of_a_dense_layer(known, tolerance):
    case = make_case([(65536, 16)])
    prepared = prepare(case, unknown_sizes=False)
    spec = tf.TensorSpec((65536 if known else None, 16), tf.float32)
    run = prepared.run.get_concrete_function(x=spec, dy=spec)
    assert_equals_one_device(case, take(prepared._replace(run=run)), tolerance)


def test_the_limit_of_xla_at_large_means():
    case = make_case([(512, 4)], offset=1e4)._replace(momentum=0.0)
    layer = make_layer(case, strategy_for(1))
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True, autograph=False)
    expected = case.expected()
    difference = np.abs(compiled(case.parts[0]).numpy() - expected.outputs[0])
    assert difference.max() <= 1e-3
    assert_close("variance", layer.moving_variance.numpy(), expected.variance, 5e-6)
