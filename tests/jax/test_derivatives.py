"""Gradients as JAX takes them: of shared weights in both modes of shard_map, and of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from tests.contract.test_features import random_weights
from tests.harness import assert_close, make_case
from tests.replicas.jax import State, distributed, make_layer

PARTS, SAME = PartitionSpec("data"), PartitionSpec()


def mesh_of(replicas):
    return Mesh(np.array(jax.devices()[:replicas]), ("data",))


def plain(x, gamma, beta, weights=None, epsilon=1e-3):
    """Batch normalization as anybody would write it, differentiable as often as one likes."""
    w = jnp.ones_like(x) if weights is None else weights
    n = w.sum(0)
    mean = (w * x).sum(0) / n
    variance = (w * jnp.square(x - mean)).sum(0) / n
    return (x - mean) / jnp.sqrt(variance + epsilon) * gamma + beta


def call(layer, trainable, x, **arguments):
    """Outputs with these weights, and the other variables after the call."""
    others = State.of(layer).others
    return layer.stateless_call(trainable, others, x, training=True, **arguments)


@pytest.mark.parametrize("checked", [True, False], ids=["check_vma", "unchecked"])
def test_gradients_of_shared_weights_are_those_of_one_device(checked):
    """In checked mode JAX hands out the sum over replicas; else each replica has its own share."""
    case = make_case([(16, 4), (16, 4)])
    x, dy = np.concatenate(case.parts), np.concatenate(case.cotangents)
    layer = make_layer(case)
    spread = SAME if checked else PARTS

    def loss(trainable, x, dy):
        local = (call(layer, trainable, x)[0] * dy).sum()
        # The global loss in checked mode; the sum of what replicas return in the other.
        return jax.lax.psum(local, "data") if checked else local

    def gradients(trainable, x, dy):
        of_weights, dx = jax.grad(loss, argnums=(0, 1))(trainable, x, dy)
        return of_weights if checked else [g[None] for g in of_weights], dx

    mapped = jax.jit(
        jax.shard_map(
            gradients,
            mesh=mesh_of(2),
            in_specs=(SAME, PARTS, PARTS),
            out_specs=(spread, PARTS),
            check_vma=checked,
        )
    )
    observed, dx = mapped(State.of(layer).trainable, x, dy)
    expected = jax.grad(
        lambda gamma, beta, x: (plain(x, gamma, beta) * dy).sum(), argnums=(0, 1, 2)
    )(case.gamma.astype("f"), case.beta.astype("f"), x)
    for own, its in zip(observed, expected, strict=False):
        assert_close("weights", own if checked else own.sum(0), its, 2e-6)
    assert_close("input", dx, expected[2], 2e-6)


def scalar_of_gradients(function, x, dy, gamma, directions):
    """A number that hangs on all first derivatives: what is derived once more."""
    y, pull_back = jax.vjp(function, x, gamma)
    dx, of_gamma = pull_back(dy)
    del y
    return (directions[0] * dx).sum(), (directions[1] * of_gamma).sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("context", ["one", "shard_map", "shard_map unchecked", "data parallel"])
def test_gradients_of_gradients(context, weighted):
    case = make_case([(6, 3), (6, 3)], dtype="float64")
    rng = np.random.default_rng(3)
    u, v = rng.normal(size=(12, 3)), rng.normal(size=3)
    x, dy = np.concatenate(case.parts), np.concatenate(case.cotangents)
    w = np.concatenate(random_weights(case._replace(parts=[p[..., :1] for p in case.parts])))
    w = np.abs(np.resize(w, (12, 1))) + 0.1 if weighted else np.ones((12, 1))
    with jax.enable_x64(True), distributed(context, 2):
        layer = make_layer(case, "float64")

        def ours(x, dy, gamma, u, w):
            def function(x, gamma):
                arguments = {"weights": w[:, 0]} if weighted else {}
                return call(layer, [gamma, case.beta], x, **arguments)[0]

            by_input, by_gamma = scalar_of_gradients(function, x, dy, gamma, (u, v))
            if context == "shard_map":
                return jax.lax.psum(by_input, "data") + by_gamma
            return by_input + by_gamma

        def expected(x, dy, gamma):
            scalars = scalar_of_gradients(
                lambda x, gamma: plain(x, gamma, case.beta, w), x, dy, gamma, (u, v)
            )
            return sum(scalars)

        derive = jax.grad(ours, argnums=(0, 1, 2))
        if context.startswith("shard_map"):
            checked = context == "shard_map"

            def of_part(*arguments):
                *rest, of_gamma = jax.grad(ours, argnums=(0, 1, 2))(*arguments)
                return *rest, of_gamma if checked else of_gamma[None]

            derive = jax.shard_map(
                of_part,
                mesh=mesh_of(2),
                in_specs=(PARTS, PARTS, SAME, PARTS, PARTS),
                out_specs=(PARTS, PARTS, SAME if checked else PARTS),
                check_vma=checked,
            )
        own = list(jax.jit(derive)(x, dy, jnp.asarray(case.gamma), u, w))
        if context == "shard_map unchecked":
            own[2] = own[2].sum(0)
        its = jax.grad(expected, argnums=(0, 1, 2))(x, dy, jnp.asarray(case.gamma))
        for name, mine, theirs in zip(("x", "dy", "gamma"), own, its, strict=True):
            assert_close(name, mine, theirs, 1e-9)


def test_forward_mode_is_refused_by_jax():
    layer = make_layer(make_case([(8, 3)]))
    x = np.ones((8, 3), "f")
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\) to a custom_vjp"):
        jax.jvp(lambda x: layer(x, training=True), (x,), (x,))


def test_recomputing_the_forward_in_the_backward_changes_nothing():
    case = make_case([(16, 3)])
    layer = make_layer(case)
    trainable = State.of(layer).trainable

    def loss(x):
        return (
            jax.checkpoint(lambda x: call(layer, trainable, x)[0])(x) * case.cotangents[0]
        ).sum()

    dx = jax.jit(jax.grad(loss))(case.parts[0])
    assert_close("input gradients", dx, case.expected().input_gradients[0], 2e-6)


def test_a_scan_over_steps_moves_the_statistics_in_each():
    case = make_case([(3, 16, 4)])
    layer = make_layer(case)
    state = State.of(layer)

    def step(others, x):
        y, others = layer.stateless_call(state.trainable, others, x, training=True)
        return others, y

    others, outputs = jax.jit(lambda x: jax.lax.scan(step, state.others, x))(case.parts[0])
    mean = np.zeros(4)
    for x, y in zip(case.parts[0], outputs, strict=True):
        mean = 0.9 * mean + 0.1 * x.mean(0)
        alone = case._replace(parts=[x], cotangents=[x])
        assert_close("outputs", y, alone.expected().outputs[0], 2e-6)
    assert_close("moving mean", others[0], mean, 2e-6)


def test_a_vmap_without_a_name_is_batches_of_their_own():
    case = make_case([(3, 16, 4)])
    layer = make_layer(case)
    trainable = State.of(layer).trainable

    def gradient(x, dy):
        return jax.grad(lambda x: (call(layer, trainable, x)[0] * dy).sum())(x)

    observed = jax.jit(jax.vmap(gradient))(case.parts[0], case.cotangents[0])
    for i, dx in enumerate(observed):
        alone = case._replace(parts=[case.parts[0][i]], cotangents=[case.cotangents[0][i]])
        assert_close("input gradients", dx, alone.expected().input_gradients[0], 2e-6)


def test_gradients_through_the_weights_of_elements_are_none():
    layer = make_layer(make_case([(8, 3)]))
    x = make_case([(8, 3)]).parts[0]
    gradient = jax.grad(lambda w: (layer(x, training=True, weights=w) * x**2).sum())
    assert not np.asarray(gradient(np.full(8, 2.0, "f"))).any()
