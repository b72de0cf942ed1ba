"""Contract 5: a masked element does not exist; weights may be fractional; still synchronized."""

import numpy as np
import pytest
from keras import ops
from tests.harness import (
    assert_close,
    assert_equals_one_device,
    assert_step_equals_one_device,
    make_case,
    masked_case,
    numbers,
    observe,
    shapes_around,
)
from tests.which_keras import SyncBatchNormalization, keras

import syncbn


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_in_a_masked_position_changes_nothing_elsewhere(garbage, mode):
    case = masked_case([(6, 5, 4), (9, 5, 4)])
    expected = case.expected()
    masks = [
        np.broadcast_to(m[..., None], p.shape) for m, p in zip(case.masks, case.parts, strict=True)
    ]
    poisoned = [
        np.where(m, p, garbage).astype("f4") for m, p in zip(masks, case.parts, strict=True)
    ]
    # Of a NaN output the next layer's gradient is NaN.
    cotangents = [
        np.where(m, c, garbage).astype("f4") for m, c in zip(masks, case.cotangents, strict=True)
    ]
    observed = observe(case._replace(parts=poisoned, cotangents=cotangents), mode=mode)
    for replica, mask in enumerate(masks):
        for name in ("outputs", "input_gradients"):
            own, its = (getattr(o, name)[replica] for o in (observed, expected))
            assert_close(name, own[mask], its[mask], 2e-6)
        assert not observed.input_gradients[replica][~mask].any()
    for name in ("gamma", "beta"):
        own = np.sum(getattr(observed, f"{name}_gradients"), axis=0)
        assert_close(name, own, getattr(expected, f"{name}_gradient"), 2e-6)
    assert_close("moving mean", observed.moving_means[0], expected.mean * 0.1, 2e-6)


@pytest.mark.parametrize("masked", [(0,), (1,), (0, 1)])
def test_a_replica_whose_mask_is_all_false_contributes_nothing(masked):
    case = masked_case([(6, 5, 4), (9, 5, 4), (3, 5, 4)])
    masks = [m & (replica not in masked) for replica, m in enumerate(case.masks)]
    case = case._replace(masks=masks)
    assert_equals_one_device(case, observe(case), 2e-6)


@pytest.mark.parametrize(
    ("replicas", "momentum", "options"),
    [
        (1, 0.9, {}),
        (2, 0.9, {}),
        (2, None, {}),
        (1, None, {"renorm": True}),
        (2, 0.9, {"renorm": True}),
        (2, None, {"unbiased_moving_variance": True}),
        (1, 0.9, {"unbiased_moving_variance": True}),
        (2, None, {"renorm": True, "unbiased_moving_variance": True}),
    ],
)
def test_nothing_but_masked_elements_moves_nothing(replicas, momentum, options):
    shapes = [(6, 5, 4), (9, 5, 4)][:replicas]
    case = masked_case(shapes, kept=0.0)._replace(momentum=momentum, options=options)
    # Nothing of what there is at the start may come out as something else, not even by rounding.
    state = {"moving_mean": np.full(4, 0.3, "f4"), "moving_variance": np.full(4, 0.7, "f4")}
    state |= {"renorm_mean": np.full(4, 0.1, "f4"), "renorm_stddev": np.full(4, 1.3, "f4")}
    state |= {"moving_stddev": np.full(4, 1.1, "f4"), "num_batches_tracked": np.array(7)}
    observed = observe(case, state=state)
    held = set(state) & set(observed.weights)
    assert len(held) == 2 + 3 * ("renorm" in options) + (momentum is None)
    for name in held:
        for copy in observed.weights[name]:
            np.testing.assert_array_equal(copy, state[name], err_msg=name)


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_axis_and_a_single_channel(axis, channels):
    """Keras's masks lack the last axis; where that is not the channels' each has its own count."""
    case = masked_case(shapes_around(axis, channels), axis=axis, dtype="float64")
    assert_equals_one_device(case, observe(case), 1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"renorm": True, "unbiased_moving_variance": True, "activation": "elu"},
        {"group_size": 1, "nan_check": True},
        {"virtual_batch_size": 3},
    ],
)
def test_a_count_for_each_channel_goes_with_every_feature(options):
    case = masked_case([(9, 3, 4), (7, 3, 4)], axis=1, dtype="float64")
    case.masks[0][:, 1] = False  # one channel with nothing on one replica
    weights = [np.linspace(1, 2, len(part)) for part in case.parts]
    case = case._replace(options=options, weights=weights, momentum=None)
    assert_step_equals_one_device(case, 1e-10)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5)])
def test_weights_lack_the_axis_of_the_channels_wherever_it_is(shape):
    case = make_case([(9, *shape), (6, *shape)], axis=1)
    rng = np.random.default_rng(4)
    weights = [rng.random((len(part), *shape[1:])).astype("f4") for part in case.parts]
    case = case._replace(weights=weights)
    assert_equals_one_device(case, observe(case), 2e-6)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)])
def test_any_rank(shape):
    case = masked_case([(19, *shape), (8, *shape)])
    assert_equals_one_device(case, observe(case), 2e-6)


@pytest.mark.parametrize("dtype", ["int32", "float32", "uint8"])
def test_a_mask_of_numbers_is_true_where_it_is_not_zero(dtype):
    case = masked_case([(9, 5, 4)])
    observed = observe(case._replace(masks=[(case.masks[0] * 3).astype(dtype)]))
    assert_close("outputs", observed.outputs[0], case.expected().outputs[0], 2e-6)


@pytest.mark.parametrize(
    ("offset", "tolerance", "dtype"),
    [
        (0.0, 2e-6, "float32"),
        (1e3, 1e-4, "float32"),
        (1e4, 1e-3, "float32"),
        (1e3, 1e-8, "float64"),
    ],
)
def test_the_variance_of_masked_elements_at_a_large_mean(offset, tolerance, dtype):
    case = masked_case([(512, 4), (300, 4)], offset=offset, dtype=dtype)._replace(momentum=0.0)
    variance = observe(case).moving_variances[0]
    assert np.abs(variance / case.expected().variance - 1).max() <= tolerance


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masked_half_precision(dtype):
    case = masked_case([(33, 5, 4), (32, 5, 4)], dtype=dtype)
    tolerance = {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    assert_equals_one_device(case, observe(case, dtype=f"mixed_{dtype}"), tolerance)


@pytest.mark.parametrize(
    ("shape", "weights"),
    [
        ((7, 3, 5, 4), (7,)),
        ((7, 3, 5, 4), (7, 1, 1)),
        ((7, 3, 5, 4), (7, 3, 1)),
        ((7, 3, 5, 4), (1, 3, 5)),
        ((7, 3, 5, 4), (7, 3, 5)),
        ((7, 3, 5, 4), ()),
        ((7, 4), (7,)),
        ((7, 4), (1,)),
    ],
)
def test_weights_are_broadcast_over_all_axes_but_the_channels(shape, weights):
    given = np.random.default_rng(4).random(weights).astype("f4")
    case = make_case([shape])._replace(weights=[given])
    assert_equals_one_device(case, observe(case), 2e-6)


def test_a_weight_of_two_is_the_element_twice():
    case = make_case([(6, 4), (5, 4)], dtype="float64")
    weights = [np.array([1.0, 2, 1, 2, 2, 1]), np.array([2.0, 1, 1, 1, 3])]
    observed = observe(case._replace(weights=weights))
    repeated = np.concatenate(
        [np.repeat(p, w.astype(int), axis=0) for p, w in zip(case.parts, weights, strict=True)]
    )
    assert_close("mean", observed.moving_means[0], 0.1 * repeated.mean(axis=0), 1e-12)
    variance = 0.9 + 0.1 * repeated.var(axis=0)
    assert_close("variance", observed.moving_variances[0], variance, 1e-12)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_are_not_rounded_to_the_compute_dtype(policy, dtype):
    """Keras would cast them with the inputs: 1.01 is 1.0078 in bfloat16."""
    x = np.array([[0.0], [1.0]], "f4")
    weights = np.array([1.0, 1.01], dtype)
    layer = SyncBatchNormalization(momentum=0.0, dtype=policy)
    layer(x, training=True, weights=weights)
    assert numbers(layer.moving_mean)[0] == pytest.approx(1.01 / 2.01, abs=2e-7)


def test_mask_and_weights_together_and_of_a_mask_that_keras_attached():
    """With a second tensor argument Keras no longer hands on the mask of the input."""
    case = masked_case([(9, 5, 4)])._replace(weights=[np.linspace(0, 2, 9).astype("f4")])
    x = np.where(case.masks[0][..., None], case.parts[0], np.float32(0))
    layer = SyncBatchNormalization()
    y = layer(keras.layers.Masking()(x), training=True, weights=case.weights[0])
    expected = case._replace(gamma=np.ones(4), beta=np.zeros(4)).expected().outputs[0]
    kept = case.masks[0]
    assert_close("outputs", numbers(y)[kept], expected[kept], 2e-6)


def test_a_weight_that_is_not_finite_may_be_masked():
    case = masked_case([(9, 5, 4)])
    weights = np.where(case.masks[0], 1.0, np.nan).astype("f4")
    observed = observe(case._replace(weights=[weights]))
    assert_close("outputs", observed.outputs[0], case.expected().outputs[0], 2e-6)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_bad_weights_raise_where_their_values_are_known_and_move_nothing(wrong):
    weights = np.ones(5, "f4")
    weights[3] = wrong
    layer = SyncBatchNormalization()
    with pytest.raises(syncbn.InputError) as raised:
        layer(np.ones((5, 4), "f4"), training=True, weights=weights)
    message = str(raised.value)
    assert "requires finite weights of at least 0" in message
    assert f"1 of 5 that are not, the first {wrong}" in message
    assert not numbers(layer.moving_mean).any()


@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        ("mask", (6,), r"Received: mask.shape=\(6,\), inputs.shape=\(6, 3, 4\)"),
        ("mask", (6, 3, 4), "A mask requires the inputs' shape without their last axis"),
        ("mask", (6, 4), r"Received: mask.shape=\(6, 4\)"),
        ("weights", (4,), r"Received: weights.shape=\(4,\), inputs.shape=\(6, 3, 4\)"),
        ("weights", (6, 3, 4), "one weight for each example"),
        ("weights", (3, 6), r"so that the first would be \(6, 3\)"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(argument, shape, message):
    layer = SyncBatchNormalization()
    with pytest.raises(syncbn.InputError, match=message):
        layer(ops.ones((6, 3, 4)), training=True, **{argument: ops.ones(shape)})


def test_the_mask_of_an_embedding_is_respected_and_handed_on():
    tokens = np.random.default_rng(0).integers(0, 11, (9, 7)).astype("int32")
    model = keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            keras.layers.Embedding(11, 4, mask_zero=True),
            SyncBatchNormalization(momentum=0.0),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )
    pooled = numbers(model(tokens, training=True))
    table = numbers(model.layers[0].embeddings).astype(np.float64)
    kept = table[tokens[tokens > 0]]
    assert_close("moving mean", numbers(model.layers[1].moving_mean), kept.mean(axis=0), 2e-6)
    normalized = (table - kept.mean(axis=0)) / np.sqrt(kept.var(axis=0) + 1e-3)
    # The pooling averages what is not masked: the mask has come through.
    expected = np.stack([normalized[row[row > 0]].mean(axis=0) for row in tokens])
    assert_close("pooled", pooled, expected, 5e-6)


def test_weights_as_an_input_of_a_functional_model():
    case = make_case([(9, 5, 4)])._replace(weights=[np.linspace(0, 2, 9).astype("f4")])
    inputs, weights = keras.Input((5, 4)), keras.Input(())
    layer = SyncBatchNormalization()
    model = keras.Model([inputs, weights], layer(inputs, weights=weights))
    layer.gamma.assign(case.gamma)
    layer.beta.assign(case.beta)
    arguments = [ops.convert_to_tensor(a) for a in (case.parts[0], case.weights[0])]
    y = numbers(model(arguments, training=True))
    assert_close("outputs", y, case.expected().outputs[0], 2e-6)
    assert keras.Model.from_config(model.get_config()).count_params() == model.count_params()


def test_in_inference_mask_and_weights_have_no_effect():
    case = masked_case([(9, 5, 4)])
    layer = SyncBatchNormalization()
    plain = layer(case.parts[0], training=False)
    weighted = layer(case.parts[0], training=False, mask=case.masks[0], weights=np.zeros(9, "f4"))
    np.testing.assert_array_equal(numbers(plain), numbers(weighted))
