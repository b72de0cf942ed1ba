"""Wherever JAX has replicas the layer gives what one device gives: every context, every feature."""

import jax
import keras
import numpy as np
import pytest
from tests.contract.test_features import CLIPPING, random_masks, random_weights
from tests.harness import assert_close, assert_equals_one_device, make_case, observe
from tests.replicas.jax import DISTRIBUTED, MAPPED, distributed, make_layer

CONTEXTS = MAPPED + DISTRIBUTED

FEATURES = {
    "equal": make_case([(16, 3, 4), (16, 3, 4)]),
    "uneven": make_case([(9, 3, 4), (17, 3, 4)]),
    "channels first": make_case([(9, 4, 3), (17, 4, 3)], axis=1),
    "empty replica": make_case([(0, 3, 4), (17, 3, 4)]),
    "mask and weights": make_case([(9, 3, 4), (17, 3, 4)]),
    "groups": make_case([(9, 3, 4), (17, 3, 4)])._replace(options={"group_size": 1}),
    "all of them": make_case([(5, 4), (9, 4), (0, 4), (7, 4)])._replace(
        momentum=None,
        options={
            "group_assignment": [[3, 0], [1, 2]],
            "renorm": True,
            "renorm_clipping": CLIPPING,
            "unbiased_moving_variance": True,
            "activation": "silu",
        },
    ),
    "virtual batches": make_case([(9, 3, 4), (17, 3, 4)])._replace(
        options={"virtual_batch_size": 4, "activation": "relu"}
    ),
}


def weighted(name):
    case = FEATURES[name]
    if name in ("mask and weights", "all of them", "virtual batches"):
        case = case._replace(masks=random_masks(case), weights=random_weights(case))
    return case


def chosen():
    """Every feature in two contexts, every context with three features: each takes a second."""
    for context in CONTEXTS:
        every = context in ("shard_map", "data parallel")
        for feature in FEATURES if every else ("uneven", "groups", "all of them"):
            yield context, feature


# Of the mutants.
CHOSEN = [*chosen(), ("pmap", "equal"), ("vmap", "empty replica"), ("shard_map unchecked", "equal")]


@pytest.mark.parametrize(("context", "feature"), CHOSEN)
def test_a_feature_gives_what_one_device_gives_in_every_context(context, feature):
    case = weighted(feature)
    assert_equals_one_device(case, observe(case, context=context), 2e-6)


@pytest.mark.parametrize("context", ["shard_map", "shard_map unchecked", "pmap", "data parallel"])
def test_float64_where_jax_has_it(context):
    case = make_case([(9, 3, 4), (17, 3, 4)], dtype="float64")
    assert_equals_one_device(case, observe(case, context=context), 1e-11)


@pytest.mark.frameworks
def test_shard_map_without_jit_is_the_same():
    case = make_case([(9, 4), (7, 4)])
    observed = observe(case, context="shard_map", mode="eager")
    assert_equals_one_device(case, observed, 2e-6)


@pytest.mark.parametrize("feature", ["uneven", "groups", "virtual batches"])
def test_a_distribution_without_jit_is_the_same(feature):
    case = weighted(feature)
    assert_equals_one_device(case, observe(case, context="data parallel", mode="eager"), 2e-6)


@pytest.mark.parametrize("context", ["shard_map", "pmap"])
def test_an_axis_that_is_named_is_the_one_that_is_found(context):
    case = weighted("uneven")
    assert_equals_one_device(case, observe(case, context=context, axis_name="data"), 2e-6)


def test_vmap_is_not_found_unless_it_is_named():
    """What the documentation says: replicas of a vmap without a name are batches of their own."""
    case = weighted("equal")
    observed = observe(case, context="vmap", axis_name=None)
    apart = case._replace(parts=case.parts[:1], cotangents=case.cotangents[:1])
    assert_close("outputs", observed.outputs[0], apart.expected().outputs[0], 2e-6)


@pytest.mark.parametrize("context", MAPPED)
def test_a_batch_without_any_element_leaves_the_moving_statistics_untouched(context):
    case = make_case([(0, 4), (0, 4)])
    assert_equals_one_device(case, observe(case, context=context), 0.0)


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"group_size": 1}])
def test_a_batch_that_the_devices_do_not_divide(options):
    """JAX cannot hand it over in parts; statistics of the whole are right all the same."""
    case = make_case([(13, 4)])
    with distributed("data parallel", 4):
        layer = make_layer(case, **options)

        def run():
            return jax.jit(lambda x: layer(x, training=True))(case.parts[0])

        if options:
            with pytest.raises(ValueError, match=r"4 devices of the batch divide\. Received"):
                run()
            return
        assert_close("outputs", run(), case.expected().outputs[0], 2e-6)


def test_half_precision_is_normalized_in_float32():
    case = make_case([(90, 4), (70, 4)], dtype="bfloat16", offset=3.0)
    observed = observe(case, dtype="mixed_bfloat16")
    assert_equals_one_device(case, observed, 1.6e-2)
    expected = case.expected()
    assert_close("mean", observed.moving_means[0], expected.mean * 0.1, 2e-6)


@pytest.mark.parametrize("context", ["shard_map unchecked", "data parallel"])
def test_the_check_of_contexts_sees_a_layer_that_does_not_synchronize(context):
    """Keras's layer is local in shard_map, and right under a distribution."""

    class Plain(keras.layers.BatchNormalization):
        def __init__(self, **arguments):
            arguments.pop("layer_class", None)
            super().__init__(**arguments)

    case = make_case([(16, 4), (16, 4)])
    case = case._replace(parts=[part + 3 * r for r, part in enumerate(case.parts)])
    observed = observe(case, context=context, layer_class=Plain)
    error = np.abs(observed.outputs[0] - case.expected().outputs[0]).max()
    assert error > 0.5 if context in MAPPED else error < 1e-5
