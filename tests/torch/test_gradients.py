"""The backward: what it keeps, gradients of gradients, the forward computed again."""

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from tests import oracle
from tests.harness import assert_close, make_case, observe
from tests.replicas.torch import POOL, array, make_layer, replica_case, tensor

import syncbn


def kept_of_the_size(x, run):
    """The storages of at least x's size that autograd keeps, and the result of `run()`."""
    kept = {}

    def pack(saved):
        if saved.numel() >= x.numel():
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = run()
    return set(kept), y


@pytest.mark.parametrize("shape", [(8, 6, 6, 5), (8, 5), (4, 6, 5)])
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"renorm": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_backward_keeps_the_input_and_no_other_tensor_of_its_size(shape, options, dtype):
    case = make_case([shape], dtype=dtype)
    layer = make_layer(case, f"mixed_{dtype}" if dtype == "float16" else dtype, **options)
    x = tensor(case.parts[0]).requires_grad_()
    kept, _ = kept_of_the_size(x, lambda: layer(x, training=True))
    assert kept == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_with_save_output_it_keeps_the_output_instead(activation):
    case = make_case([(8, 6, 6, 5)])
    layer = make_layer(case, save="output", activation=activation)
    x = tensor(case.parts[0]).requires_grad_()
    kept, y = kept_of_the_size(x, lambda: layer(x, training=True))
    assert kept == {y.untyped_storage().data_ptr()}


def test_the_search_for_kept_tensors_finds_them():
    x = torch.randn(8, 5, requires_grad=True)
    kept, _ = kept_of_the_size(x, lambda: (x - x.mean()) ** 3)
    assert kept - {x.untyped_storage().data_ptr()}


def scalar_of_gradients(case, directions):
    """Σ <u, dx> + <v, dγ> + <w, dβ> of the whole batch, by the oracle."""
    expected = case.expected()
    of_inputs = sum(
        (u * dx).sum() for u, dx in zip(directions[0], expected.input_gradients, strict=True)
    )
    return (
        of_inputs + directions[1] @ expected.gamma_gradient + directions[2] @ expected.beta_gradient
    )


def differences(function, values, step=1e-5):
    gradient = np.zeros_like(values)
    for index in np.ndindex(*values.shape):
        moved = [values.copy(), values.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        gradient[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


def second_order(case, direction, of_weights, arguments):
    layer = make_layer(case, "float64", **arguments)
    x, dy = tensor(case.parts[0]).requires_grad_(), tensor(case.cotangents[0]).requires_grad_()
    gamma, beta = layer.gamma.value, layer.beta.value
    options = {} if case.masks is None else {"mask": tensor(case.masks[0])}
    y = layer(x, training=True, **options)
    dx, *gradients = torch.autograd.grad(y, (x, gamma, beta), dy, create_graph=True)
    scalar = (tensor(direction) * dx).sum()
    for along, gradient in zip(of_weights, gradients, strict=True):
        scalar = scalar + (tensor(along) * gradient).sum()
    return tuple(map(array, torch.autograd.grad(scalar, (x, dy, gamma))))


def with_masks(case):
    rng = np.random.default_rng(3)
    return case._replace(masks=[rng.random(part.shape[:-1]) > 0.4 for part in case.parts])


@pytest.mark.parametrize("variant", ["plain", "masked", "activated"])
@pytest.mark.parametrize("sizes", [(6,), (4, 3), (5, 0)], ids=["one", "uneven", "empty"])
def test_gradients_of_gradients_are_those_of_the_whole_batch(sizes, variant):
    case = make_case([(size, 2, 3) for size in sizes], dtype="float64")
    case = with_masks(case) if variant == "masked" else case
    case = case._replace(options={"activation": "tanh"} if variant == "activated" else {})
    rng = np.random.default_rng(5)
    directions = [rng.normal(size=p.shape) for p in case.parts], *rng.normal(size=(2, 3))
    arguments = [
        (replica_case(case, replica), directions[0][replica], directions[1:], {})
        for replica in range(len(sizes))
    ]
    if len(sizes) == 1:
        results = [second_order(*arguments[0])]
    else:
        results = POOL.run(second_order, arguments)
    for replica, result in enumerate(results):
        for name, observed in zip(("parts", "cotangents"), result, strict=False):

            def moved(values, name=name, replica=replica):
                arrays = list(getattr(case, name))
                arrays[replica] = values
                return scalar_of_gradients(case._replace(**{name: arrays}), directions)

            expected = differences(moved, getattr(case, name)[replica])
            assert_close(f"by {name} of replica {replica}", observed, expected, 1e-6)
    expected = differences(
        lambda gamma: scalar_of_gradients(case._replace(gamma=gamma), directions), case.gamma
    )
    assert_close("by gamma", np.sum([of[2] for of in results], axis=0), expected, 1e-6)


def test_a_masked_nan_is_in_no_gradient_of_a_gradient_through_the_activation():
    case = with_masks(make_case([(6, 2, 3)], dtype="float64"))
    case = case._replace(options={"activation": "tanh"})
    rng = np.random.default_rng(5)
    directions = rng.normal(size=(6, 2, 3)), rng.normal(size=(2, 3))
    clean = second_order(replica_case(case, 0), directions[0], directions[1], {})
    mask = case.masks[0][..., None]
    dirty = case._replace(parts=[np.where(mask, case.parts[0], np.nan)])
    found = second_order(replica_case(dirty, 0), directions[0], directions[1], {})
    for own, its in zip(found, clean, strict=True):
        assert_close("second order", own, its, 1e-12)


def test_gradients_of_gradients_are_refused_where_the_input_is_not_kept():
    layer = make_layer(make_case([(6, 3)]), save="output")
    x = torch.randn(6, 3, requires_grad=True)
    y = layer(x, training=True)
    with pytest.raises(syncbn.UnsupportedFeatureError, match="save='input'"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def checkpointed(case, reentrant):
    layer = make_layer(case)
    x = tensor(case.parts[0]).requires_grad_()
    # Something that keeps the outputs: else the second forward ends before it moves anything.
    one = torch.ones((), requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: layer(x, training=True) * one, x, use_reentrant=reentrant
    )
    y.backward(tensor(case.cotangents[0]))
    return tuple(map(array, (x.grad, layer.gamma.value.grad, layer.moving_mean.value)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_gives_the_same_gradients_and_moves_the_statistics_twice(reentrant):
    """Twice, as torch's own: the forward runs twice, and nothing tells the layer which is which."""
    case = make_case([(5, 4), (7, 4)])
    arguments = [(replica_case(case, replica), reentrant) for replica in range(2)]
    results = POOL.run(checkpointed, arguments)
    expected = case.expected()
    for own, its in zip(results, expected.input_gradients, strict=True):
        assert_close("input gradients", own[0], its, 2e-6)
    of_gamma = sum(own[1] for own in results)
    assert_close("gamma gradient", of_gamma, expected.gamma_gradient, 2e-6)
    twice = oracle.moved(oracle.moved(np.zeros(4), expected.mean, 0.9), expected.mean, 0.9)
    assert_close("moving mean", results[0][2], twice, 2e-6)
    assert results[0][2].tobytes() == results[1][2].tobytes()


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize("sizes", [(8,), (5, 6)])
def test_what_is_in_a_masked_position_changes_nothing_elsewhere(sizes, garbage):
    case = with_masks(make_case([(size, 2, 3) for size in sizes]))
    clean = observe(case)
    parts = [part.copy() for part in case.parts]
    cotangents = [cotangent.copy() for cotangent in case.cotangents]
    for part, cotangent, mask in zip(parts, cotangents, case.masks, strict=True):
        part[~mask] = garbage
        cotangent[~mask] = garbage
    dirty = observe(case._replace(parts=parts, cotangents=cotangents))
    for name in ("gamma_gradients", "beta_gradients", "moving_means", "moving_variances"):
        np.testing.assert_array_equal(getattr(dirty, name), getattr(clean, name))
    for replica, mask in enumerate(case.masks):
        np.testing.assert_array_equal(dirty.outputs[replica][mask], clean.outputs[replica][mask])
        own, its = dirty.input_gradients[replica], clean.input_gradients[replica]
        np.testing.assert_array_equal(own[mask], its[mask])
        assert not own[~mask].any()


def test_no_gradient_flows_to_weights():
    layer = make_layer(make_case([(6, 3)]))
    weights = torch.rand(6, requires_grad=True)
    x = torch.randn(6, 3, requires_grad=True)
    layer(x, training=True, weights=weights).sum().backward()
    assert weights.grad is None
