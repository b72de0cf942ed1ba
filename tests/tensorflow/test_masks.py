"""Masks and weights in TensorFlow's own terms: its table, gradients of gradients, XLA, models."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.derivatives import input_gradient_along
from tests.differences import central_differences
from tests.harness import (
    assert_close,
    assert_equals_one_device,
    make_case,
    masked_case,
    observe,
    shapes_around,
)
from tests.replicas.tensorflow import local_results, make_layer, per_replica, strategy_for

import syncbn
from syncbn._backends.tensorflow import collectives


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_axis_and_a_single_channel_by_the_float32_table(axis, channels, monkeypatch):
    monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    case = masked_case(shapes_around(axis, channels), axis=axis, dtype="float64")
    assert_equals_one_device(case, observe(case), 2e-6)


def test_masked_elements_by_the_float32_table(monkeypatch):
    monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    case = masked_case([(33, 5, 4), (32, 5, 4), (0, 5, 4)])
    assert_equals_one_device(case, observe(case), 2e-6)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_bad_weights_on_one_replica_raise_and_leave_nothing_behind(wrong):
    case = make_case([(6, 4), (5, 4)])
    weights = [np.ones(len(part), "f4") for part in case.parts]
    weights[-1][3] = wrong
    strategy = strategy_for(2)
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
