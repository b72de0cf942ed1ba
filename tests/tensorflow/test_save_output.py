"""`save="output"`: the backward from the output, which the next layer keeps anyway."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.derivatives import input_gradient_along
from tests.graphs import collectives_of, memory_kept_for_the_backward
from tests.harness import assert_close, assert_equals_one_device, make_case, observe
from tests.replicas.tensorflow import (
    make_layer,
    make_step,
    per_replica,
    prepare,
    strategy_for,
    take,
)

import syncbn
from syncbn._backends.tensorflow import inversion, normalization

Stopped = tf.errors.InvalidArgumentError


def case_of(sizes, *, dtype="float32", shape=(6, 5), **options):
    """With gammas of both signs."""
    case = make_case([(size, *shape) for size in sizes], dtype=dtype)
    signs = np.where(np.arange(len(case.gamma)) % 2, 1.0, -1.0)
    return case._replace(gamma=case.gamma * signs, options={"save": "output"} | options)


def with_some_masked(case):
    rng = np.random.default_rng(1)
    masks = [rng.random(part.shape[:-1]) > 0.4 for part in case.parts]
    weights = [rng.uniform(0.5, 2, len(part)).astype("f4") for part in case.parts]
    return case._replace(masks=masks, weights=weights)


LEAKY = {"activation": "leaky_relu"}


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        (case_of((14, 9), dtype="float64"), {}),
        (case_of((0, 17), **LEAKY), {}),
        (case_of((9,), shape=(40, 60, 4), **LEAKY), {}),
        (case_of((14, 9), **LEAKY), {"mode": "eager"}),
        (with_some_masked(case_of((14, 9), **LEAKY)), {}),
        (case_of((14, 9), renorm=True), {"unknown_sizes": False}),
        (case_of((8, 0, 13), dtype="float64", group_assignment=[[0, 2], [1]]), {}),
    ],
    ids=["float64", "empty", "large", "eager", "masked", "renorm", "groups"],
)
def test_it_gives_what_one_device_gives(case, arguments):
    tolerance = 1e-11 if case.parts[0].dtype == np.float64 else 2e-6
    assert_equals_one_device(case, observe(case, **arguments), tolerance)


def test_channels_that_are_not_last_and_no_weights():
    case = make_case([(5, 6, 4), (4, 6, 4)], axis=1)
    case = case._replace(gamma=np.ones(6), beta=np.zeros(6))
    observed = observe(case, save="output", center=False, scale=False)
    for name in ("outputs", "input_gradients"):
        for own, its in zip(getattr(observed, name), getattr(case.expected(), name), strict=True):
            assert_close(name, own, its, 2e-6)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_nothing_but_the_gradient_knows_and_it_inverts_the_very_slope_that_was_applied(dtype):
    """TensorFlow rounds leaky_relu's slope to the dtype, and to float32 for float64."""
    policy = {"float16": "mixed_float16"}.get(dtype, dtype)
    case = case_of((14,), dtype=dtype, **LEAKY)
    observed, with_input = observe(case, dtype=policy), observe(case, dtype=policy, save="input")
    for name in ("outputs", "moving_means", "moving_variances"):
        np.testing.assert_array_equal(getattr(observed, name), getattr(with_input, name))
    tolerance = {"float16": 1e-3, "float64": 1e-13}[dtype]
    for name in ("input_gradients", "gamma_gradients"):
        assert_close(name, getattr(observed, name), getattr(with_input, name), tolerance)


def test_an_inversion_that_forgets_the_sign_of_gamma_would_be_noticed(monkeypatch):
    of_output = inversion.of_output

    def unsigned(*arguments):
        scaling = of_output(*arguments)
        return scaling._replace(inverse=tf.abs(scaling.inverse))

    monkeypatch.setattr(inversion, "of_output", unsigned)
    case = case_of((14,))
    with pytest.raises(AssertionError, match="gamma gradient"):
        assert_equals_one_device(case, observe(case), 2e-6)


def what_a_convolution_keeps_too(**arguments):
    """What the backward of a layer and of the convolution behind it keeps, x's name, y's name."""
    case = make_case([(8, 20, 20, 24)])
    layer = make_layer(case, strategy_for(1), **arguments)
    convolution = keras.layers.Conv2D(24, 1, use_bias=False)
    convolution.build((None, 20, 20, 24))

    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            z = convolution(y)
        gradients = tape.gradient(z, [x, convolution.kernel.value], output_gradients=dy)
        return y, gradients

    return memory_kept_for_the_backward(
        step, tf.constant(case.parts[0]), tf.constant(case.cotangents[0])
    )


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_the_input_is_not_kept_and_the_output_is_the_tensor_that_the_next_layer_keeps(activation):
    kept, _, output = what_a_convolution_keeps_too(save="output", activation=activation)
    assert kept == {output}
    # The control: one tensor more.
    kept, x, output = what_a_convolution_keeps_too(activation=activation)
    assert kept == {x, output}


def test_a_layer_that_keeps_its_input_all_the_same_would_be_noticed(monkeypatch):
    def keeping_the_input(part, _, *arguments):
        return normalization._normalized(part, *arguments)

    monkeypatch.setattr(normalization, "_keeping_the_output", keeping_the_input)
    kept, x, output = what_a_convolution_keeps_too(save="output")
    assert kept == {x, output}


def test_small_tensors_too():
    case = case_of((8,), **LEAKY)
    layer = make_layer(case, strategy_for(1))
    x, dy = tf.constant(case.parts[0]), tf.constant(case.cotangents[0])
    kept, _, output = memory_kept_for_the_backward(make_step(layer), x, dy)
    assert kept == {output}


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_a_masked_nan_in_the_output_touches_nothing(garbage):
    case = with_some_masked(case_of((14,), **LEAKY))
    parts = [np.where(case.masks[0][..., None], case.parts[0], np.float32(garbage))]
    observed, clean = observe(case._replace(parts=parts)), observe(case)
    assert not np.isfinite(observed.outputs[0][~case.masks[0]]).any()
    for name in ("input_gradients", "gamma_gradients", "beta_gradients", "moving_variances"):
        np.testing.assert_array_equal(getattr(observed, name), getattr(clean, name))


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize(
    ("channel", "gamma", "beta"), [(1, 0.0, 0.0), (2, np.nan, 0.1), (3, -1e-4, 0.5)]
)
def test_gamma_that_cannot_be_divided_by_stops_all_replicas_before_anything_moves(
    channel, gamma, beta, mode
):
    case = case_of((5, 4))
    case.gamma[channel], case.beta[channel] = gamma, beta
    prepared = prepare(case, mode=mode, unknown_sizes=False, name="norm_7")
    with pytest.raises(Stopped) as raised:
        take(prepared)
    message = str(raised.value)
    assert "Layer norm_7 with save=output requires |gamma| of at least 1e-30" in message
    assert "|beta / gamma| of at most 4096 in every channel, in float32" in message
    assert f"Received: 1 channels that are not so, the first of them channel {channel}" in message
    assert "Take save=input for this layer" in message
    assert not prepared.layer.moving_mean.numpy().any()
    # In inference nothing is inverted.
    assert prepared.layer(case.parts[0]).shape == case.parts[0].shape
    # The replicas stopped together: the next step meets no one who waits.
    prepared.layer.gamma.assign(np.ones(5))
    take(prepared)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_up_to_the_limits_it_goes_and_beyond_it_does_not(dtype):
    kept = syncbn._backends.interface.KeptOutput("norm", 1.0)
    union = normalization.Moments(*tf.ones((3, 1), tf.float64))
    dtype = tf.as_dtype(dtype)
    wide = normalization.statistics_dtype(dtype)
    least = inversion._LEAST_GAMMA[dtype]
    most = 2.0 ** {8: 4, 11: 5, 24: 12, 53: 26}[inversion._DIGITS[dtype]]
    for gamma, beta, holds in (
        (least, least * most, True),
        (-least, -least * most, True),
        (least * 0.99, 0.0, False),
        (1.0, most * 1.01, False),
    ):
        vectors = tf.constant([gamma], wide), tf.constant([beta], wide)
        try:
            inversion.checked(kept, *vectors, dtype, union)
        except Stopped:
            assert not holds
        else:
            assert holds


def test_a_gamma_initializer_of_zeros_is_stopped_at_the_first_step():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            syncbn.SyncBatchNormalization(save="output", gamma_initializer="zeros", name="first"),
            keras.layers.Dense(1),
        ]
    )
    assert not model.layers[0].supports_jit
    model.compile("sgd", "mse")
    with pytest.raises(Stopped, match=r"Layer first with .* by its initializer \(not zeros\)"):
        model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)


def test_the_check_needs_no_collective_of_its_own():
    case = case_of((5, 4))
    layer, strategy = make_layer(case, strategy_for(2)), strategy_for(2)
    run = tf.function(
        lambda x: strategy.run(lambda x: layer(x, training=True), args=(x,)), autograph=False
    )
    assert len(collectives_of(run, per_replica(strategy, case.parts))) == 2


@pytest.mark.parametrize("watched", ["input", "cotangent", "gamma"])
@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_gradients_of_gradients_are_refused(watched, mode):
    case = case_of((6,), dtype="float64")
    layer = make_layer(case, strategy_for(1), "float64")
    x, dy = tf.constant(case.parts[0]), tf.constant(case.cotangents[0])
    of = {"input": x, "cotangent": dy, "gamma": layer.gamma.value}[watched]

    def second(x, dy):
        by = {"input": x, "cotangent": dy}.get(watched, of)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(by)
            scalar = input_gradient_along(layer, x, dy, tf.ones_like(x))
        return tape.gradient(scalar, by)

    with pytest.raises(syncbn.UnsupportedFeatureError, match="Take save='input'"):
        (tf.function(second, autograph=False) if mode == "graph" else second)(x, dy)


def test_xla_which_would_leave_the_check_out_is_refused():
    layer = make_layer(case_of((6,)), strategy_for(1))
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True, autograph=False)
    with pytest.raises(syncbn.UnsupportedFeatureError, match="or take save='input'"):
        compiled(tf.ones((6, 6, 5)))


def test_the_inverse_of_elu_loses_what_that_of_leaky_relu_keeps():
    """Why it is refused: 5 of float32's 24 bits are gone at −5, 10 at −10, all at −18."""

    def bits_lost(x, again):
        return np.log2(np.abs(again - x).max() / np.abs(x).max() * 2**24)

    for around, lost in ((5, 5), (10, 10)):
        x = np.linspace(-around - 0.5, -around + 0.5, 1000, dtype="f4")
        assert bits_lost(x, np.log1p(np.expm1(x))) > lost
        assert bits_lost(x, x * np.float32(0.2) / np.float32(0.2)) < 1
    assert np.expm1(np.float32(-18)) == -1
