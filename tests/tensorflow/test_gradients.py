"""The gradient: what it keeps in memory, and gradients of gradients."""

import numpy as np
import pytest
import tensorflow as tf
from tests import oracle
from tests.differences import central_differences
from tests.graphs import kept_for_the_backward
from tests.harness import assert_close, make_case
from tests.replicas.tensorflow import (
    local_results,
    make_layer,
    make_step,
    per_replica,
    strategy_for,
)


@pytest.mark.parametrize("shape", [(8, 6, 6, 5), (8, 5), (4, 6, 5), (2, 3, 4, 4, 5)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_backward_keeps_the_input_and_no_other_tensor_of_its_size(shape, dtype):
    case = make_case([shape], dtype=dtype)
    layer = make_layer(case, strategy_for(1), f"mixed_{dtype}" if dtype == "float16" else dtype)
    x, dy = tf.constant(case.parts[0]), tf.constant(case.cotangents[0])
    # The input arrives as a Placeholder; a reshape of it is the same memory.
    assert kept_for_the_backward(make_step(layer), x, dy) <= {"Placeholder", "Reshape"}


def test_the_search_for_kept_tensors_finds_them():
    def keeps_the_centred_input(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = (x - tf.reduce_mean(x)) ** 3
        return tape.gradient(y, x, output_gradients=dy)

    kept = kept_for_the_backward(keeps_the_centred_input, tf.zeros((8, 5)), tf.zeros((8, 5)))
    assert kept - {"Placeholder", "Reshape"}


def scalar_of_gradients(case, directions):
    """Σ <u, dx> + <v, dγ> + <w, dβ> of the whole batch, by the oracle."""
    expected = case.expected()
    of_inputs = sum(
        (u * dx).sum() for u, dx in zip(directions[0], expected.input_gradients, strict=True)
    )
    return (
        of_inputs + directions[1] @ expected.gamma_gradient + directions[2] @ expected.beta_gradient
    )


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("sizes", [(6,), (4, 3), (5, 0)], ids=["one device", "uneven", "empty"])
def test_gradients_of_gradients_are_those_of_the_whole_batch(sizes, mode):
    case = make_case([(size, 2, 3) for size in sizes], dtype="float64")
    strategy = strategy_for(len(sizes))
    layer = make_layer(case, strategy, "float64")
    rng = np.random.default_rng(5)
    directions = [rng.normal(size=p.shape) for p in case.parts], *rng.normal(size=(2, 3))

    def step(x, dy, u):
        gamma, beta = layer.gamma.value, layer.beta.value
        with tf.GradientTape() as outer:
            outer.watch((x, dy))
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = layer(x, training=True)
            dx, *of_weights = inner.gradient(y, (x, gamma, beta), output_gradients=dy)
            scalar = tf.reduce_sum(u * dx)
            for direction, gradient in zip(directions[1:], of_weights, strict=True):
                scalar += tf.reduce_sum(direction * gradient)
        return outer.gradient(scalar, (x, dy, gamma))

    arguments = [
        per_replica(strategy, arrays) for arrays in (case.parts, case.cotangents, directions[0])
    ]

    def run(*arguments):
        return strategy.run(step, args=arguments)

    results = (tf.function(run, autograph=False) if mode == "graph" else run)(*arguments)
    of_x, of_dy, of_gamma = (local_results(strategy, result) for result in results)

    for replica in range(len(sizes)):
        for name, observed in (("parts", of_x), ("cotangents", of_dy)):

            def moved(array, name=name, replica=replica):
                arrays = list(getattr(case, name))
                arrays[replica] = array
                return scalar_of_gradients(case._replace(**{name: arrays}), directions)

            expected = central_differences(moved, getattr(case, name)[replica])
            assert_close(f"by {name} of replica {replica}", observed[replica], expected, 1e-6)
    expected = central_differences(
        lambda gamma: scalar_of_gradients(case._replace(gamma=gamma), directions), case.gamma
    )
    assert_close("by gamma", np.sum(of_gamma, axis=0), expected, 1e-6)


def test_a_gradient_that_treats_statistics_as_constants_would_be_noticed():
    """The oracle's own check: its gradient is that of its outputs, by differences."""
    case = make_case([(4, 3), (3, 3)], dtype="float64")

    def moved(array):
        outputs = oracle.batch_normalization(
            [array, case.parts[1]], case.cotangents, -1, case.gamma, case.beta, case.epsilon
        ).outputs
        return sum((y * dy).sum() for y, dy in zip(outputs, case.cotangents, strict=True))

    expected = central_differences(moved, case.parts[0])
    assert_close("oracle", case.expected().input_gradients[0], expected, 1e-7)
    assert np.abs(case.cotangents[0] - expected).max() > 0.1


@pytest.mark.parametrize("replicas", [1, 2])
def test_recomputing_the_forward_in_the_backward_changes_nothing(replicas):
    case = make_case([(5, 4), (7, 4)][:replicas])
    strategy = strategy_for(replicas)
    layer = make_layer(case, strategy)

    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.recompute_grad(lambda x: layer(x, training=True))(x)
        return tape.gradient(y, x, output_gradients=dy)

    @tf.function(autograph=False)
    def run(x, dy):
        return strategy.run(step, args=(x, dy))

    observed = run(per_replica(strategy, case.parts), per_replica(strategy, case.cotangents))
    for own, its in zip(
        local_results(strategy, observed), case.expected().input_gradients, strict=True
    ):
        assert_close("input gradients", own, its, 2e-6)
