"""On one device, argument by argument: what keras.layers.BatchNormalization gives, where right."""

import functools
import itertools

import numpy as np
import pytest
from tests import one_device
from tests.harness import assert_close, make_case, numbers
from tests.which_keras import TF_KERAS, SyncBatchNormalization, keras

STEPS = 3
KERAS_HAS_RENORM = hasattr(keras.layers.BatchNormalization(), "renorm")

# Of a masked batch Keras divides by the count plus 1e-7. In half precision both round what they
# read and write.
TOLERANCE = {"float32": 1e-5, "float64": 1e-8, "mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}
if TF_KERAS or keras.backend.backend() in ("jax", "torch"):
    # Keras computes the moments of float64 in float32 there, and tf_keras rounds 1 − momentum to
    # it; ours are held to the oracle's.
    TOLERANCE["float64"] = 2e-6

# Each argument's values; the grid is all of them with each other.
ARGUMENTS = {
    "axis": (-1, 1),
    "center": (True, False),
    "scale": (True, False),
    "momentum": (0.99, 0.3),
    "epsilon": (1e-3, 1e-5),
}
RENORM = {
    "no renorm": {},
    "renorm": {"renorm": True},
    "clipped": {
        "renorm": True,
        "renorm_clipping": {"rmax": 1.1, "rmin": 0.9, "dmax": 0.1},
        "renorm_momentum": 0.6,
    },
    "half clipped": {"renorm": True, "renorm_clipping": {"rmax": 1.02}},
}
INITIALIZERS = {
    "beta_initializer": keras.initializers.Constant(0.5),
    "gamma_initializer": keras.initializers.Constant(1.5),
    "moving_mean_initializer": keras.initializers.Constant(0.25),
    "moving_variance_initializer": keras.initializers.Constant(2.0),
}


@functools.cache
def keras_counts_all_that_a_mask_leaves():
    """Older Keras, 3.7 too, counts one element for all that a mask's truth value stands for.

    That is right where the channels are last alone: elsewhere its mean of ones is more than one.
    """
    layer = keras.layers.BatchNormalization(axis=1, momentum=0.0)
    layer(np.ones((1, 2, 3), "f4"), training=True, mask=np.ones((1, 2), bool))
    return bool(np.all(numbers(layer.moving_mean) < 2))


def train(layer, case, mask, trainable=True):
    """Outputs, gradients and weights of some steps, the last in inference."""
    layer.build(case.parts[0].shape)
    layer.trainable = trainable
    results = []
    for step in range(STEPS + 1):
        x = (case.parts[0] * (step + 1) + step).astype(case.parts[0].dtype)
        results += one_device.step(layer, x, case.cotangents[0], training=step < STEPS, mask=mask)
        # Before Keras 3.5 the attribute is missing without the weight.
        for variable in (getattr(layer, name, None) for name in ("gamma", "beta")):
            if variable is not None:  # any update that is the same for both
                variable.assign(variable * 0.9 + 0.1)
        results += [numbers(weight) for weight in layer.weights]
    return results


def assert_same(arguments, dtype="float32", masked=False, trainable=True):
    axis = arguments.get("axis", -1)
    shape = (12, 5, 4) if axis == -1 else (12, 4, 5)
    case = make_case([shape], axis=axis, dtype="float64" if dtype == "float64" else "float32")
    mask = None
    if masked:
        mask = np.random.default_rng(1).random(shape[:-1]) > 0.4
        # What is masked does not exist for our gradients; Keras lets its cotangent in.
        case = case._replace(cotangents=[np.where(mask[..., None], case.cotangents[0], 0)])
    with one_device.precision(dtype):
        layers = [
            layer_class(**arguments, **INITIALIZERS, dtype=dtype)
            for layer_class in (SyncBatchNormalization, keras.layers.BatchNormalization)
        ]
        ours, theirs = (train(layer, case, mask, trainable) for layer in layers)
    assert [w.name for w in layers[0].weights] == [w.name for w in layers[1].weights]
    for number, (own, its) in enumerate(zip(ours, theirs, strict=True)):
        assert own.dtype == its.dtype
        own, its = (value.astype(np.float64) for value in (own, its))
        if mask is not None and own.shape == shape:
            own, its = own[mask], its[mask]
        assert_close(f"result {number} of {arguments}", own, its, TOLERANCE[dtype])


GRID = [
    dict(zip(ARGUMENTS, values, strict=True)) for values in itertools.product(*ARGUMENTS.values())
]


@pytest.mark.parametrize("renorm", RENORM)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_every_combination_of_arguments_is_keras_s(masked, dtype, renorm):
    if RENORM[renorm] and not KERAS_HAS_RENORM:
        pytest.skip("Keras before 3.13 has no renorm to compare with")
    if TF_KERAS and dtype == "float64" and RENORM[renorm]:
        pytest.skip("tf_keras takes a maximum of float64 and float32, and fails")
    # In half precision and in float64 a sample of the grid, with every value of each argument, and
    # where the arguments are the same code as on TensorFlow.
    whole = dtype == "float32" and keras.backend.backend() == "tensorflow" and not TF_KERAS
    for arguments in GRID if whole else GRID[::5]:
        if not masked or arguments["axis"] == -1 or keras_counts_all_that_a_mask_leaves():
            assert_same(arguments | RENORM[renorm], dtype, masked)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True])
def test_a_frozen_layer_is_keras_s(dtype, masked):
    assert_same({}, dtype, masked, trainable=False)


def test_regularizers_and_constraints_are_keras_s():
    arguments = {
        "gamma_regularizer": keras.regularizers.L2(0.1),
        "beta_regularizer": keras.regularizers.L1(0.2),
        "gamma_constraint": keras.constraints.NonNeg(),
        "beta_constraint": keras.constraints.MaxNorm(0.5),
    }
    losses, weights = [], []
    for layer_class in (SyncBatchNormalization, keras.layers.BatchNormalization):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), layer_class(**arguments)])
        model.compile(keras.optimizers.SGD(1.0), "mse")
        x = np.random.default_rng(0).normal(size=(32, 4))
        history = model.fit(x, -x, batch_size=8, epochs=2, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
        weights.append(model.get_weights())
    assert_close("loss", losses[0], losses[1], 2e-5)
    for own, its in zip(*weights, strict=True):
        assert_close("weight", own, its, 2e-5)


# From here on: where Keras is wrong, and this layer is not.


def test_keras_crashes_at_a_mask_and_one_channel():
    x, mask = np.array([[1.0], [2.0], [6.0]], "f4"), np.array([True, False, True])
    if not TF_KERAS:
        with pytest.raises(IndexError, match="tuple index out of range"):
            keras.layers.BatchNormalization(axis=1)(x, training=True, mask=mask)
    layer = SyncBatchNormalization(axis=1, momentum=0.0)
    layer(x, training=True, mask=mask)
    assert numbers(layer.moving_mean) == pytest.approx([3.5])


def test_keras_moves_its_statistics_by_a_batch_without_elements():
    x, mask = np.ones((2, 3, 4), "f4"), np.zeros((2, 3), bool)
    theirs, ours = keras.layers.BatchNormalization(), SyncBatchNormalization()
    for layer in (theirs, ours):
        layer(x, training=True, mask=mask)
    assert numbers(theirs.moving_variance) == pytest.approx([0.99] * 4)
    np.testing.assert_array_equal(numbers(ours.moving_variance), np.ones(4))


def test_keras_lets_the_cotangent_of_what_is_masked_into_the_gradient_of_gamma():
    case = make_case([(6, 5, 4)])
    mask = np.random.default_rng(1).random((6, 5)) > 0.4
    expected = case._replace(masks=[mask], gamma=np.ones(4)).expected().gamma_gradient
    gradients = []
    for layer_class in (SyncBatchNormalization, keras.layers.BatchNormalization):
        layer = layer_class()
        layer.build((None, 5, 4))
        _, _, of_gamma, _ = one_device.step(layer, case.parts[0], case.cotangents[0], mask=mask)
        gradients.append(of_gamma)
    assert_close("gamma gradient", gradients[0], expected, 2e-6)
    assert np.abs(gradients[1] - expected).max() > 0.1


def test_keras_prints_the_name_of_a_variable():
    if TF_KERAS or not KERAS_HAS_RENORM:
        pytest.skip("Keras before 3.13 has no renorm, tf_keras no check of it")
    with pytest.raises(ValueError, match=r"rmax=\{rmax\}"):
        keras.layers.BatchNormalization(renorm=True, renorm_clipping={"rmax": 1.0, "rmin": 2.0})
