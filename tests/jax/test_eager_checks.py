"""What is checked by values, where code is not compiled: NaN, and outputs that can be inverted."""

import jax
import keras
import numpy as np
import pytest
from tests.contract.test_features import random_masks, random_weights
from tests.harness import assert_equals_one_device, make_case, observe

import syncbn

TOLERANCE = {"float32": 2e-6, "float64": 1e-11}


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "leaky_relu"}, {"renorm": True}, {"masked": True, "nan_check": True}],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_backward_from_the_output_is_that_from_the_input(options, dtype):
    case = make_case([(33, 4, 3)], dtype=dtype)._replace(
        options={"save": "output"} | {n: v for n, v in options.items() if n != "masked"}
    )
    if "masked" in options:
        case = case._replace(masks=random_masks(case), weights=random_weights(case))
    # x̂ is off by the roundings of the output.
    tolerance = TOLERANCE[dtype] * 5
    assert_equals_one_device(case, observe(case, mode="eager"), tolerance)


def test_save_output_keeps_no_input():
    case = make_case([(64, 3)])
    layer = syncbn.SyncBatchNormalization(save="output")
    x = jax.numpy.asarray(case.parts[0])
    y, pull_back = jax.vjp(lambda x: layer(x, training=True), x)
    kept = [array for array in jax.tree.leaves(pull_back) if array.shape == x.shape]
    assert any(np.array_equal(array, y) for array in kept)
    assert not any(np.array_equal(array, x) for array in kept)


@pytest.mark.parametrize(
    ("gamma", "beta"), [(0.0, 0.0), (1e-33, 0.0), (1.0, 5000.0), (float("nan"), 0.0)]
)
def test_a_gamma_that_cannot_be_divided_by_is_refused(gamma, beta):
    layer = syncbn.SyncBatchNormalization(save="output", name="norm")
    layer.build((None, 3))
    layer.gamma.assign([1.0, gamma, 1.0])
    layer.beta.assign([1.0, beta, 1.0])
    with pytest.raises(FloatingPointError, match=r"'norm' .* the first of them channel 1 with"):
        layer(make_case([(8, 3)]).parts[0], training=True)
    assert not np.asarray(layer.moving_mean).any()


def test_a_gradient_of_a_gradient_is_refused_without_the_input():
    layer = syncbn.SyncBatchNormalization(save="output")
    x = make_case([(8, 3)]).parts[0]

    def squared(x):
        return (jax.grad(lambda x: (layer(x, training=True) ** 3).sum())(x) ** 2).sum()

    with pytest.raises(syncbn.UnsupportedFeatureError, match="a gradient of a gradient"):
        jax.grad(squared)(x)


@pytest.mark.parametrize(("where", "value"), [("input", np.nan), ("input", np.inf), ("state", 1)])
def test_nan_is_found_and_nothing_is_updated(where, value):
    layer = syncbn.SyncBatchNormalization(nan_check=True, name="norm")
    x = make_case([(8, 3)]).parts[0].copy()
    layer.build(x.shape)
    if where == "input":
        x[2, 1] = value
    else:
        layer.moving_variance.assign([1.0, np.nan, 1.0])
    before = [np.asarray(weight) for weight in layer.weights]
    found = "its input" if where == "input" else "the state of the layer"
    with pytest.raises(FloatingPointError, match=f"'norm' .* NaN or infinity in {found}"):
        layer(x, training=True)
    for own, its in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(own, its)


@pytest.mark.parametrize("arguments", [{"nan_check": True}, {"save": "output"}])
def test_fit_does_not_compile_and_trains_all_the_same(arguments):
    """`jit_compile="auto"` asks the layers; Keras's JAX trainer then compiles nothing."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 5)).astype("f"), rng.normal(size=(32, 2)).astype("f")
    results = []
    for options in ({}, arguments):
        keras.utils.set_random_seed(0)
        norm = syncbn.SyncBatchNormalization(**options)
        model = keras.Sequential([keras.Input((5,)), norm, keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        assert model.jit_compile is (not options)
        model.fit(x, y, batch_size=16, epochs=2, verbose=0, shuffle=False)
        results.append(model.get_weights())
    for own, its in zip(*results, strict=True):
        np.testing.assert_allclose(own, its, atol=2e-6)
