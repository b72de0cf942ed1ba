"""Every feature on 1 to 4 replicas, uneven and empty parts, compiled or not, is one device's."""

import numpy as np
import pytest
from tests.harness import assert_step_equals_one_device, make_case
from tests.which_keras import keras

TOLERANCE = {"float64": 1e-11, "float32": 2e-6}

SPLITS = {
    "one": (13,),
    "uneven": (14, 9),
    "empty": (0, 17),
    "three": (8, 0, 13),
    "four": (9, 11, 0, 7),
}


def random_masks(case):
    rng = np.random.default_rng(1)
    return [rng.random(p.shape[:-1]) > 0.4 for p in case.parts]


def random_weights(case):
    """Of all sizes, with some zeros, a tenth of them large."""
    rng = np.random.default_rng(2)
    shapes = [np.delete(p.shape, case.axis) for p in case.parts]
    weights = [rng.random(shape) * rng.choice([0, 1, 1, 4], shape) for shape in shapes]
    return [weight.astype(case.parts[0].dtype) for weight in weights]


def groups(case):
    """The first and the last replica together, and those between."""
    ends = sorted({0, len(case.parts) - 1})
    between = [replica for replica in range(len(case.parts)) if replica not in ends]
    return {"group_assignment": [ends, between] if between else [[end] for end in ends]}


def with_options(**options):
    return lambda case: case._replace(options=options)


CLIPPING = {"rmin": 0.9, "rmax": 1.05, "dmax": 0.02}

FEATURES = {
    "mask": lambda case: case._replace(masks=random_masks(case)),
    "weights": lambda case: case._replace(weights=random_weights(case)),
    "mask and weights": lambda case: case._replace(
        masks=random_masks(case), weights=random_weights(case)
    ),
    "renorm": with_options(renorm=True),
    "renorm clipped": with_options(renorm=True, renorm_clipping=CLIPPING, renorm_momentum=0.5),
    "groups": lambda case: case._replace(options=groups(case)),
    "group_size": lambda case: case._replace(
        options={"group_size": {1: 1, 2: 2, 3: 3, 4: 2}[len(case.parts)]}
    ),
    "groups of one": with_options(group_size=1),
    "virtual batches": with_options(virtual_batch_size=4),
    "masked virtual batches": lambda case: case._replace(
        masks=random_masks(case), options={"virtual_batch_size": 4}
    ),
    "unbiased": with_options(unbiased_moving_variance=True),
    "cumulative": lambda case: case._replace(momentum=None),
    "relu": with_options(activation="relu"),
    "silu": with_options(activation="silu"),
    "nan_check": with_options(nan_check=True),
    "from the output": with_options(save="output", activation="leaky_relu"),
    "all of them": lambda case: case._replace(
        masks=random_masks(case),
        weights=random_weights(case),
        momentum=None,
        options={
            "renorm": True,
            "renorm_clipping": CLIPPING,
            "unbiased_moving_variance": True,
            "activation": "silu",
            "nan_check": True,
            **groups(case),
        },
    ),
}


def build(feature, split, dtype, axis=-1):
    shape = (4, 3, 5) if axis == -1 else (5, 4, 3)
    case = make_case([(size, *shape) for size in SPLITS[split]], dtype=dtype, axis=axis)
    return FEATURES[feature](case)


# What Keras computes with float32 somewhere, also of float64.
ROUNDED_BY_KERAS = {"tensorflow": ("leaky_relu",), "jax": ("tanh",)}

DTYPES = {"graph": "float32", "eager": "float64"}
EAGER_ON_JAX = ("mask", "groups", "all of them")


def chosen():
    """Of all combinations so many that every feature meets four splits and both modes.

    Compiling a step takes a second on some backend. Features of one kind stand next to each other
    above, so that each split meets each kind in the one mode or the other.
    """
    for number, feature in enumerate(FEATURES):
        splits = ("uneven", "empty", "four", ("one", "three")[number % 2])
        for turn, split in enumerate(splits):
            yield feature, split, ("graph", "eager")[(number // 2 + turn) % 2]


@pytest.mark.parametrize(("feature", "split", "mode"), list(chosen()))
def test_a_feature_gives_what_one_device_gives(feature, split, mode):
    dtype = DTYPES[mode]
    # Uncompiled JAX compiles each operation by itself, for seconds: a part of them is enough there.
    if keras.backend.backend() == "jax" and split != "one" and feature not in EAGER_ON_JAX:
        mode = "graph"
    case, tolerance = build(feature, split, dtype), TOLERANCE[dtype]
    if case.options.get("activation") in ROUNDED_BY_KERAS.get(keras.backend.backend(), ()):
        tolerance = TOLERANCE["float32"]
    assert_step_equals_one_device(case, tolerance, mode)


def test_every_feature_meets_both_modes_and_every_split_too():
    met = set(chosen())
    for feature in FEATURES:
        assert {mode for f, _, mode in met if f == feature} == set(DTYPES)
    assert {(split, mode) for _, split, mode in met} == {(s, m) for s in SPLITS for m in DTYPES}
