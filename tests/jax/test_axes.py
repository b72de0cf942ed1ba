"""Which mapped axes are summed over, on meshes of two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from tests.harness import assert_close, make_case
from tests.replicas.jax import State, make_layer, make_step

import syncbn

MESH_SHAPE = (2, 2)


def observed_on_mesh(case, batch, channels=None, axis_name=None, checked=True, **options):
    """Outputs, input gradients, gradients of weights and statistics, of parts by these axes."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(MESH_SHAPE), ("data", "model"))
    # The layer of a device has the channels that are there, of the state of all of them.
    state = State.of(make_layer(case))
    width = len(case.gamma) // (1 if channels is None else 2)
    own = case._replace(
        parts=[part[:, :width] for part in case.parts],
        gamma=case.gamma[:width],
        beta=case.beta[:width],
    )
    step = make_step(make_layer(own, axis_name=axis_name, **options))
    parts, vectors = PartitionSpec(batch, channels), PartitionSpec(channels)
    if not checked:
        # What the devices hold, of which JAX then does not know that it is the same.
        vectors = PartitionSpec(("data", "model"))
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(PartitionSpec(channels), parts, parts),
        out_specs=(parts, parts, vectors, vectors),
        check_vma=checked,
    )
    return jax.jit(mapped)(state, case.parts[0], case.cotangents[0])


def assert_is_one_device(case, observed):
    expected = case.expected()
    y, dx, (of_gamma, of_beta), (mean, variance) = observed
    assert_close("outputs", y, expected.outputs[0], 2e-6)
    assert_close("input gradients", dx, expected.input_gradients[0], 2e-6)
    assert_close("gamma", of_gamma, expected.gamma_gradient, 2e-6)
    assert_close("beta", of_beta, expected.beta_gradient, 2e-6)
    assert_close("moving mean", mean, expected.mean * 0.1, 2e-6)
    assert_close("moving variance", variance, 0.9 + expected.variance * 0.1, 2e-6)


@pytest.mark.parametrize("batch", ["data", "model", ("data", "model"), ("model", "data")])
def test_the_axes_that_the_inputs_vary_over_are_found(batch):
    case = make_case([(16, 6)])
    assert_is_one_device(case, observed_on_mesh(case, batch))


@pytest.mark.parametrize("batch", ["data", ("data", "model")])
def test_they_are_named_as_well(batch):
    case = make_case([(16, 6)])
    assert_is_one_device(case, observed_on_mesh(case, batch, axis_name=batch))


def test_channels_split_over_an_axis_need_the_name_of_the_other():
    case = make_case([(16, 6)])
    assert_is_one_device(case, observed_on_mesh(case, "data", "model", axis_name="data"))
    with pytest.raises(syncbn.NotSynchronizableError, match=r"vary over \['model'\]"):
        observed_on_mesh(case, "data", "model")


def test_a_name_of_one_of_two_axes_of_the_batch_leaves_the_other_local():
    """The gradients of weights are the sums over both all the same, as JAX wants them."""
    case = make_case([(16, 6)])
    y, _, (_, of_beta), _ = jax.tree.map(
        np.asarray,
        observed_without_statistics(case, ("data", "model"), "model"),
    )
    halves = [case._replace(parts=[case.parts[0][i : i + 8]]) for i in (0, 8)]
    halves = [
        half._replace(cotangents=[case.cotangents[0][i : i + 8]])
        for half, i in zip(halves, (0, 8), strict=True)
    ]
    assert_close("outputs", y[:8], halves[0].expected().outputs[0], 2e-6)
    assert_close("outputs", y[8:], halves[1].expected().outputs[0], 2e-6)
    assert_close("beta", of_beta, case.cotangents[0].sum(0), 2e-6)


def observed_without_statistics(case, batch, axis_name):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(MESH_SHAPE), ("data", "model"))
    layer = make_layer(case, axis_name=axis_name)
    step = make_step(layer)
    parts = PartitionSpec(batch)

    def body(*arguments):
        y, dx, of_weights, _ = step(*arguments)
        return y, dx, of_weights, jnp.zeros(())

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(), parts, parts),
        out_specs=(parts, parts, PartitionSpec(), PartitionSpec()),
    )
    return jax.jit(mapped)(State.of(layer), case.parts[0], case.cotangents[0])


def test_where_jax_does_not_say_who_varies_the_name_is_needed():
    """Without it copies over the other axis would count as parts of the batch."""
    case = make_case([(16, 6)])
    with pytest.raises(syncbn.NotSynchronizableError, match="JAX does not say over which"):
        observed_on_mesh(case, "data", checked=False)
    options = {"axis_name": "data", "unbiased_moving_variance": True}
    y, dx, _, (mean, variance) = observed_on_mesh(case, "data", checked=False, **options)
    expected = case.expected()
    assert_close("outputs", y, expected.outputs[0], 2e-6)
    assert_close("input gradients", dx, expected.input_gradients[0], 2e-6)
    unbiased = expected.variance * 16 / 15
    for moving, step in ((mean, expected.mean * 0.1), (variance, 0.9 + unbiased * 0.1)):
        copies = np.asarray(moving).reshape(4, 6)
        assert len({copy.tobytes() for copy in copies}) == 1
        assert_close("statistics", copies[0], step, 2e-6)


@pytest.mark.parametrize("transform", ["scan", "remat", "vmap"])
def test_axes_are_found_inside_other_transformations(transform):
    case = make_case([(16, 6)])
    layer = make_layer(case)
    transforms = {
        "scan": lambda f: lambda x: jax.lax.scan(lambda _, x: (None, f(x)), None, x[None])[1][0],
        "remat": jax.checkpoint,
        "vmap": lambda f: lambda x: jax.vmap(f)(x[None])[0],
    }
    mapped = jax.shard_map(
        transforms[transform](lambda x: layer(x, training=True)),
        mesh=Mesh(np.array(jax.devices()[:4]), ("data",)),
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )
    y = jax.jit(mapped)(case.parts[0])
    assert_close("outputs", y, case.expected().outputs[0], 2e-6)
