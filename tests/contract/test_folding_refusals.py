"""What fold leaves as it is, with the reason, and what it refuses."""

import re

import keras
import numpy as np
import pytest
from keras import layers
from tests.contract.test_folding import assert_same_outputs, count, norm, randomized

import syncbn
from syncbn.folding import fold, plan_folding


class Own(layers.BatchNormalization):
    pass


class OwnDense(layers.Dense):
    pass


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """A layer whose code calls others."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)
        self.norm = norm(name="inside")

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((None, 4))

    def call(self, x, training=None):
        return self.norm(self.dense(x), training=training)


def twice(x):
    shared = norm()
    return shared(layers.Dense(4)(shared(layers.Dense(4)(x))))


def dense_twice(x):
    shared = layers.Dense(4)
    return norm()(shared(norm()(shared(x))))


def skip(x):
    y = layers.Dense(4, name="d")(x)
    return layers.Add(name="sum")([norm()(y), y])


def an_output(x):
    y = layers.Dense(4, name="d")(x)
    return [norm()(y), y]


def adapted(x):
    dense = layers.Dense(4, name="d")
    y = dense(x)
    dense.enable_lora(2)
    return norm()(y)


def quantized(x):
    dense = layers.Dense(4, name="d")
    y = dense(x)
    dense.quantize("int8")
    return norm()(y)


def not_finite(x):
    layer = norm()
    y = layer(layers.Dense(4, name="d")(x))
    layer.moving_variance.assign(np.full(4, -1.0))
    return y


def in_training_inside(x):
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), norm()])
    return inner(x, training=True)


CASES = {
    "activation": (lambda x: norm()(layers.Dense(4, "relu", name="d")(x)), '"d" applies an activ'),
    "inner activation": (
        lambda x: norm()(norm(activation="relu")(layers.Dense(4, name="d")(x))),
        "applies an activation before it",
    ),
    "skip": (skip, 'the outputs of "d" go elsewhere too: to "sum"'),
    "output": (an_output, 'the outputs of "d" go elsewhere too: to the outputs of the model'),
    "called twice": (twice, "it is called in several places"),
    "layer called twice": (dense_twice, '"dense" is called in several places'),
    "input": (lambda x: norm()(x), "its input is the model's"),
    "other layer": (
        lambda x: norm()(layers.ReLU(name="r")(layers.Dense(4)(x))),
        r'its input is that of "r" \(ReLU\)',
    ),
    "operation": (lambda x: norm()(x * 2.0), r'its input is that of "multiply" \(Multiply\)'),
    "axis": (
        lambda x: norm(axis=1)(layers.Dense(4, name="d")(layers.RepeatVector(3)(x))),
        'its axis is 1, that of the channels of "d" 2',
    ),
    "einsum": (
        lambda x: norm()(
            layers.EinsumDense("abc,cd->adb", (5, 3), name="d")(layers.RepeatVector(3)(x))
        ),
        'its axis is 2, that of the channels of "d" none',
    ),
    "subclass": (lambda x: Own()(layers.Dense(4)(x)), "Own is a class of its own"),
    "layer of a subclass": (
        lambda x: norm()(OwnDense(4, name="d")(x)),
        r'its input is that of "d" \(OwnDense\)',
    ),
    "hidden": (lambda x: Block(name="block")(x), "it is called by the code of Block, which Keras"),
    "training": (lambda x: norm()(layers.Dense(4)(x), training=True), "called with training=True"),
    "training around": (in_training_inside, "called with training=True"),
    "mask": (
        lambda x: norm()(layers.Dense(4)(x), mask=x[:, 0] > 0),
        "called with a mask of its own",
    ),
    "weights": (lambda x: norm()(layers.Dense(4)(x), weights=x[:, 0]), "called with `weights`"),
    "dtype": (
        lambda x: norm(dtype="float32")(layers.Dense(4, dtype="mixed_bfloat16", name="d")(x)),
        'it makes float32 of the bfloat16 of "d"',
    ),
    "LoRA": (adapted, '"d" is adapted by LoRA'),
    "not finite": (not_finite, 'the weights of "d" would not be finite'),
}


if hasattr(layers.Dense, "quantize"):  # Keras 3.0 has none
    CASES["quantized"] = (quantized, '"d" is quantized')
if keras.backend.backend() == "tensorflow":
    CASES["bias"] = (
        lambda x: norm(axis=1)(
            layers.Conv1D(3, 2, data_format="channels_first", use_bias=False, name="d")(
                layers.Reshape((1, 4))(x)
            )
        ),
        'Keras adds a bias of "d" along its last axis, which is as long',
    )


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_folded_is_left_with_the_reason(name):
    make, reason = CASES[name]
    x = keras.Input((4,))
    model = keras.Model(x, make(x))
    plan = plan_folding(model)
    assert plan.left
    found = plan.left[-1].reason
    assert re.search(reason, found), found
    folded = fold(model, verbose=False)
    assert count(folded) == len({id(one.layer) for one in plan.left})
    if name not in ("quantized", "not finite"):
        assert_same_outputs(folded, model, 2e-6)


def test_a_frozen_layer_called_in_training_folds():
    x = keras.Input((4,))
    model = randomized(keras.Model(x, norm(trainable=False)(layers.Dense(4)(x), training=True)))
    assert count(fold(model, verbose=False)) == 0


def test_masks_that_keras_hands_on_do_not_hinder_and_stay():
    x = keras.Input((5,), dtype="int32")
    y = norm()(layers.Dense(4)(layers.Embedding(7, 3, mask_zero=True)(x)))
    model = randomized(keras.Model(x, layers.GlobalAveragePooling1D()(y)))
    folded = fold(model, verbose=False)
    assert count(folded) == 0
    batch = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0]], "int32")
    assert_same_outputs(folded, model, 2e-6, batch)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = norm()

    def call(self, x):
        return self.norm(x)


class Unmakeable(layers.Layer):
    def __init__(self, size, function):
        super().__init__()
        self.sizes = size, function

    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            Subclassed,
            "functional or Sequential.*Subclassed, whose dataflow its own .*that it is made of",
        ),
        (lambda: keras.Sequential([layers.Dense(1)]), "not built. Build it"),
        (lambda: layers.Dense(1), "Received: keras.*Dense. Give the model itself"),
        (lambda: None, "Received: builtins.NoneType"),
    ],
)
def test_a_model_whose_dataflow_is_not_known_is_refused(model, match):
    for function in (fold, plan_folding):
        with pytest.raises(syncbn.InputError, match=match):
            function(model())


def test_a_layer_that_cannot_be_made_anew_is_named():
    model = keras.Sequential([keras.Input((3,)), Unmakeable(2, object())])
    with pytest.raises(syncbn.InputError, match="Received: layer 'unmakeable' of class Unmakeable"):
        fold(model)
