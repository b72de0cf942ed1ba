"""What stops training with an error: `nan_check`, and what `save="output"` cannot invert."""

import numpy as np
import pytest
import torch
from tests.harness import assert_close, assert_equals_one_device, make_case, observe
from tests.replicas.torch import POOL, array, make_layer, replica_case, step, tensor

import syncbn


def refused(case, arguments):
    """The message, and whether any of the layer's variables has changed."""
    layer = make_layer(case, **arguments)
    before = [array(w.value) for w in layer.weights]
    with pytest.raises(syncbn.InputError) as raised:
        layer(tensor(case.parts[0]), training=True)
    for own, its in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(array(own.value), its)
    # Nobody is left waiting in a collective: the next call is one of all.
    layer.gamma.assign(np.ones(len(case.gamma)))
    layer(torch.nan_to_num(tensor(case.parts[0]), posinf=0.0), training=True)
    return str(raised.value)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize(("replicas", "bad"), [(1, [0]), (2, [1]), (3, [0, 2])])
def test_it_names_the_layer_the_replica_and_the_input_on_every_rank(replicas, bad, garbage):
    case = make_case([(5 + r, 3, 4) for r in range(replicas)])
    for replica in bad:
        case.parts[replica][2, 1, 3] = garbage
    arguments = {"nan_check": True, "name": "norm_7"}
    cases = [(replica_case(case, replica), arguments) for replica in range(replicas)]
    messages = POOL.run(refused, cases) if replicas > 1 else [refused(*cases[0])]
    found = "; ".join(f"replica {replica}: its input" for replica in bad)
    for message in messages:
        assert "Layer norm_7 with nan_check=True requires finite numbers" in message
        assert f"Received: NaN or infinity in {found}." in message


def test_it_tells_the_layer_s_state_from_its_input_and_is_quiet_about_what_is_masked():
    layer = make_layer(make_case([(5, 3)]), nan_check=True)
    x = torch.randn(5, 3)
    x[0] = torch.nan
    mask = torch.tensor([False, True, True, True, True])
    assert torch.isfinite(layer(x, training=True, mask=mask)[mask]).all()
    layer.beta.assign(np.full(3, np.inf))
    with pytest.raises(syncbn.InputError, match="replica 0: the state of the layer"):
        layer(x, training=True, mask=mask)
    with pytest.raises(syncbn.InputError, match="replica 0: its input and the state of the layer"):
        layer(x, training=True)


def case_of(sizes, *, dtype="float32", **options):
    """With gammas of both signs."""
    case = make_case([(size, 6, 5) for size in sizes], dtype=dtype)
    signs = np.where(np.arange(5) % 2, 1.0, -1.0)
    return case._replace(gamma=case.gamma * signs, options={"save": "output"} | options)


def masked(case):
    rng = np.random.default_rng(1)
    return case._replace(masks=[rng.random(part.shape[:-1]) > 0.4 for part in case.parts])


LEAKY = {"activation": "leaky_relu"}


@pytest.mark.parametrize(
    "case",
    [
        case_of((14, 9), dtype="float64"),
        case_of((0, 17), **LEAKY),
        masked(case_of((14, 9), **LEAKY)),
        case_of((14, 9), renorm=True),
        case_of((8, 0, 13), dtype="float64", group_assignment=[[0, 2], [1]]),
    ],
    ids=["float64", "empty", "masked", "renorm", "groups"],
)
def test_save_output_gives_what_one_device_gives(case):
    tolerance = 1e-11 if case.parts[0].dtype == np.float64 else 2e-6
    assert_equals_one_device(case, observe(case), tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_save_output_inverts_the_very_slope_that_was_applied(dtype):
    policy = dtype if dtype == "float64" else f"mixed_{dtype}"
    case = case_of((14,), dtype=dtype, **LEAKY)
    observed, with_input = observe(case, dtype=policy), observe(case, dtype=policy, save="input")
    np.testing.assert_array_equal(observed.outputs[0], with_input.outputs[0])
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float64": 1e-13}[dtype]
    for name in ("input_gradients", "gamma_gradients"):
        assert_close(name, getattr(observed, name), getattr(with_input, name), tolerance)


@pytest.mark.parametrize(("gamma", "beta"), [(0.0, 0.0), (1e-5, 1.0), (np.nan, 0.0)])
def test_save_output_stops_where_gamma_cannot_divide(gamma, beta):
    case = make_case([(5, 4), (6, 4)])
    case.gamma[2], case.beta[2] = gamma, beta
    arguments = {"save": "output", "name": "norm_7"}
    messages = POOL.run(refused, [(replica_case(case, r), arguments) for r in range(2)])
    for message in messages:
        assert "Layer norm_7 with save=output requires |gamma|" in message
        assert "Received: 1 channels that are not so, the first of them channel 2" in message


def test_an_error_on_one_rank_does_not_hang_the_tests():
    """The harness's own check: what a rank raises comes back, with its traceback."""
    case = make_case([(5, 4)])
    with pytest.raises(ValueError, match="nonsense") as raised:
        POOL.run(step, [(case._replace(options={}), "float32", True, {"nonsense": 1})] * 2)
    assert "rank 0: Traceback" in raised.value.__notes__[0]
