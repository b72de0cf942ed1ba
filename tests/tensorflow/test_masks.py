"""Contract 5: a masked element does not exist; weights may be fractional; still synchronized."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.derivatives import central_differences, input_gradient_along
from tests.harness import assert_close, assert_equals_one_device, make_case, observe
from tests.replicas.tensorflow import local_results, make_layer, per_replica, strategy_for

import syncbn
from syncbn._backends.tensorflow import collectives


def masked_case(shapes, kept=0.6, **arguments):
    case = make_case(shapes, **arguments)
    rng = np.random.default_rng(3)
    return case._replace(masks=[rng.random(shape[:-1]) < kept for shape in shapes])


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


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"unbiased_moving_variance": True}])
@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("replicas", [1, 2])
def test_nothing_but_masked_elements_moves_nothing(replicas, momentum, options):
    shapes = [(6, 5, 4), (9, 5, 4)][:replicas]
    case = masked_case(shapes, kept=0.0)._replace(momentum=momentum, options=options)
    strategy = strategy_for(replicas)
    layer = make_layer(case, strategy)
    before = [weight.numpy() for weight in layer.weights]
    strategy.run(
        lambda x, mask: layer(x, training=True, mask=mask),
        args=(per_replica(strategy, case.parts), per_replica(strategy, case.masks)),
    )
    for own, its in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(own.numpy(), its)


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("table", [False, True], ids=["float64 payload", "float32 table"])
def test_any_axis_and_a_single_channel(axis, channels, table, monkeypatch):
    """Keras's masks lack the last axis; where that is not the channels' each has its own count."""
    if table:
        monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    shape = [5, 4]
    shape.insert(2 if axis == -1 else axis - 1, channels)
    case = masked_case([(9, *shape), (7, *shape)], axis=axis, dtype="float64")
    assert_equals_one_device(case, observe(case), 2e-6 if table else 1e-11)


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
    assert_equals_one_device(case, observe(case), 1e-10)


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
    layer = make_layer(case, strategy_for(1))
    mask = (case.masks[0] * 3).astype(dtype)
    y = layer(case.parts[0], training=True, mask=mask)
    assert_close("outputs", y, case.expected().outputs[0], 2e-6)


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


def test_masked_elements_by_the_float32_table(monkeypatch):
    monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    case = masked_case([(33, 5, 4), (32, 5, 4), (0, 5, 4)])
    assert_equals_one_device(case, observe(case), 2e-6)


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
    layer = syncbn.SyncBatchNormalization(momentum=0.0, dtype=policy)
    layer(x, training=True, weights=weights)
    assert layer.moving_mean.numpy()[0] == pytest.approx(1.01 / 2.01, abs=2e-7)


def test_mask_and_weights_together_and_of_a_mask_that_keras_attached():
    """With a second tensor argument Keras no longer hands on the mask of the input."""
    case = masked_case([(9, 5, 4)])._replace(weights=[np.linspace(0, 2, 9).astype("f4")])
    layer = make_layer(case, strategy_for(1))
    x = tf.constant(case.parts[0])
    x._keras_mask = tf.constant(case.masks[0])
    y = layer(x, training=True, weights=case.weights[0])
    assert_close("outputs", y, case.expected().outputs[0], 2e-6)


def test_a_weight_that_is_not_finite_may_be_masked():
    case = masked_case([(9, 5, 4)])
    weights = np.where(case.masks[0], 1.0, np.nan).astype("f4")
    y = make_layer(case, strategy_for(1))(
        case.parts[0], training=True, mask=case.masks[0], weights=weights
    )
    assert_close("outputs", y, case.expected().outputs[0], 2e-6)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_bad_weights_raise_in_eager_mode_and_move_nothing(wrong, replicas):
    case = make_case([(6, 4), (5, 4)][:replicas])
    weights = [np.ones(len(part), "f4") for part in case.parts]
    weights[-1][3] = wrong
    strategy = strategy_for(replicas)
    layer = make_layer(case, strategy)
    with pytest.raises(syncbn.InputError) as raised:
        strategy.run(
            lambda x, w: layer(x, training=True, weights=w),
            args=(per_replica(strategy, case.parts), per_replica(strategy, weights)),
        )
    message = str(raised.value)
    assert "requires finite weights of at least 0" in message
    assert f"1 of {len(weights[-1])} that are not, the first {wrong}" in message
    assert not layer.moving_mean.numpy().any()
    # And nothing is left behind that the next step would meet.
    assert_equals_one_device(case, observe(case, mode="eager"), 2e-6)


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
    layer = syncbn.SyncBatchNormalization()
    with pytest.raises(syncbn.InputError, match=message):
        layer(tf.ones((6, 3, 4)), training=True, **{argument: tf.ones(shape)})


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function, tf.recompute_grad])
def test_weights_are_constants_for_the_gradient(wrap):
    """Also where TensorFlow derives a whole function by all its arguments."""
    case = make_case([(6, 4)])._replace(weights=[np.linspace(0.5, 2, 6).astype("f4")])
    layer = make_layer(case, strategy_for(1))
    x, weights = tf.constant(case.parts[0]), tf.constant(case.weights[0])
    normalize = wrap(lambda x, w: layer(x, training=True, weights=w))
    with tf.GradientTape() as tape:
        tape.watch((x, weights))
        y = normalize(x, weights * 1.0)
    dx, of_weights = tape.gradient(
        y, (x, weights), case.cotangents[0], unconnected_gradients="zero"
    )
    assert_close("input gradients", dx, case.expected().input_gradients[0], 2e-6)
    assert not of_weights.numpy().any()


@pytest.mark.parametrize("sizes", [(6,), (4, 3)])
def test_a_masked_gradient_of_gradients_is_that_of_the_whole_batch(sizes):
    """By differences of the oracle, in the directions of the inputs."""
    case = masked_case([(size, 3, 2) for size in sizes], dtype="float64")
    case = case._replace(weights=[np.linspace(0.5, 2, size) for size in sizes])
    strategy = strategy_for(len(sizes))
    layer = make_layer(case, strategy, "float64")
    rng = np.random.default_rng(5)
    directions = [rng.normal(size=part.shape) for part in case.parts]

    def step(x, dy, u, mask, weights):
        with tf.GradientTape() as outer:
            outer.watch(x)
            scalar = input_gradient_along(layer, x, dy, u, mask=mask, weights=weights)
        return outer.gradient(scalar, x)

    arrays = (case.parts, case.cotangents, directions, case.masks, case.weights)
    observed = tf.function(lambda *a: strategy.run(step, args=a), autograph=False)(
        *(per_replica(strategy, array) for array in arrays)
    )

    for replica, own in enumerate(local_results(strategy, observed)):

        def moved(part, replica=replica):
            parts = [*case.parts[:replica], part, *case.parts[replica + 1 :]]
            gradients = case._replace(parts=parts).expected().input_gradients
            return sum((u * dx).sum() for u, dx in zip(directions, gradients, strict=True))

        expected = central_differences(moved, case.parts[replica])
        assert_close(f"replica {replica}", own, expected, 1e-6)


def test_compiled_by_xla_masks_and_weights_are_as_right():
    case = masked_case([(33, 5, 4)])._replace(weights=[np.linspace(0, 2, 33).astype("f4")])
    layer = make_layer(case, strategy_for(1))
    compiled = tf.function(
        lambda x, m, w: layer(x, training=True, mask=m, weights=w), jit_compile=True
    )
    y = compiled(case.parts[0], case.masks[0], case.weights[0])
    assert_close("outputs", y, case.expected().outputs[0], 2e-6)


def embedding_model(layer):
    return keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            keras.layers.Embedding(11, 4, mask_zero=True),
            layer,
            keras.layers.GlobalAveragePooling1D(),
        ]
    )


def test_the_mask_of_an_embedding_is_respected_and_handed_on_on_replicas():
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 11, (size, 7)).astype("int32") for size in (6, 3)]
    strategy = strategy_for(2)
    with strategy.scope():
        model = embedding_model(syncbn.SyncBatchNormalization(momentum=0.0))
    run = tf.function(
        lambda x: strategy.run(lambda x: model(x, training=True), args=(x,)), autograph=False
    )
    pooled = local_results(strategy, run(per_replica(strategy, tokens)))
    table = model.layers[0].embeddings.numpy().astype(np.float64)
    whole = np.concatenate(tokens)
    kept = table[whole[whole > 0]]
    assert_close("moving mean", model.layers[1].moving_mean.numpy(), kept.mean(axis=0), 2e-6)
    normalized = (table - kept.mean(axis=0)) / np.sqrt(kept.var(axis=0) + 1e-3)
    for own, its in zip(pooled, tokens, strict=True):
        # The pooling averages what is not masked: the mask has come through.
        expected = np.stack([normalized[row[row > 0]].mean(axis=0) for row in its])
        assert_close("pooled", own, expected, 5e-6)


def test_keras_synchronized_with_a_mask_is_local():
    """What this layer is for: the same model with Keras's own synchronization."""
    case = masked_case([(16, 5, 4), (16, 5, 4)])
    case = case._replace(parts=[part + 10 * r for r, part in enumerate(case.parts)])
    strategy = strategy_for(2)
    layer = make_layer(
        case, strategy, layer_class=keras.layers.BatchNormalization, synchronized=True
    )
    outputs = strategy.run(
        lambda x, mask: layer(x, training=True, mask=mask),
        args=(per_replica(strategy, case.parts), per_replica(strategy, case.masks)),
    )
    # Not by the moving means: Keras 3.7 averages those over the replicas when they are assigned.
    for own, mask in zip(local_results(strategy, outputs), case.masks, strict=True):
        assert_close("mean of a replica's outputs", own[mask].mean(axis=0), case.beta, 1e-4)
    assert_equals_one_device(case, observe(case), 2e-6)


def test_weights_as_an_input_of_a_functional_model():
    case = make_case([(9, 5, 4)])._replace(weights=[np.linspace(0, 2, 9).astype("f4")])
    inputs, weights = keras.Input((5, 4)), keras.Input(())
    layer = syncbn.SyncBatchNormalization()
    model = keras.Model([inputs, weights], layer(inputs, weights=weights))
    layer.gamma.assign(case.gamma)
    layer.beta.assign(case.beta)
    y = model([tf.constant(case.parts[0]), tf.constant(case.weights[0])], training=True)
    assert_close("outputs", y, case.expected().outputs[0], 2e-6)
    assert keras.Model.from_config(model.get_config()).count_params() == model.count_params()


def test_in_inference_mask_and_weights_have_no_effect():
    case = masked_case([(9, 5, 4)])
    layer = make_layer(case, strategy_for(1))
    plain = layer(case.parts[0], training=False)
    weighted = layer(case.parts[0], training=False, mask=case.masks[0], weights=tf.zeros(9))
    np.testing.assert_array_equal(plain, weighted)
