"""Converted models on replicas give what Keras's layer gives on one device with the whole batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.harness import assert_close
from tests.replicas.tensorflow import per_replica, strategy_for
from tests.zoo import places, randomized

import syncbn

PARTS = (5, 3)  # examples of each replica

# By family of keras.applications: one of its models, and a small size of images that it takes.
FAMILIES = {
    "densenet": ("DenseNet121", 32),
    "efficientnet": ("EfficientNetB0", 32),
    "efficientnet_v2": ("EfficientNetV2B0", 32),
    "inception_resnet_v2": ("InceptionResNetV2", 75),
    "inception_v3": ("InceptionV3", 75),
    "mobilenet": ("MobileNet", 32),
    "mobilenet_v2": ("MobileNetV2", 32),
    "mobilenet_v3": ("MobileNetV3Small", 32),
    "nasnet": ("NASNetMobile", 32),
    "resnet": ("ResNet50", 32),
    "resnet_v2": ("ResNet50V2", 32),
    "xception": ("Xception", 71),
}


@pytest.fixture(autouse=True)
def _float64():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(before)


def application(family, top=True):
    name, size = FAMILIES[family]
    options = {"classes": 10} if top else {"include_top": False}
    make = getattr(keras.applications, name)
    return make(weights=None, input_shape=(size, size, 3), **options)


def nested():
    backbone = application("mobilenet_v2", top=False)
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((32, 32, 3)), backbone, *head])


def without_dropout(model):
    """Whose masks would differ between one device and replicas."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return model


def on_replicas(model, strategy, x):
    """The model's outputs in training, of all replicas one behind the other."""
    parts = per_replica(strategy, np.split(x, np.cumsum(PARTS)[:-1]))
    run = tf.function(lambda x: strategy.run(lambda part: model(part, training=True), args=(x,)))
    return np.concatenate([np.asarray(t) for t in strategy.experimental_local_results(run(parts))])


def assert_converted_is_one_device(make, tolerance):
    """In inference bit for bit, in training with different data on each replica."""
    plain = without_dropout(make())
    rng = np.random.default_rng(0)
    weights = [  # near what they were: of far ones hundreds of layers make infinity
        w * rng.uniform(0.9, 1.1, w.shape).astype(w.dtype) for w in plain.get_weights()
    ]
    plain.set_weights(weights)
    x = rng.normal(2.0, 1.0, (sum(PARTS), *plain.input_shape[1:]))
    inference = np.asarray(plain(x))
    one_device = np.asarray(tf.function(lambda x: plain(x, training=True))(x))
    strategy = strategy_for(len(PARTS))
    with strategy.scope():
        model = without_dropout(make())
    model.set_weights(weights)
    planned = syncbn.plan_conversion(model)
    assert len(planned.replaced) > 3
    assert not planned.left
    local = on_replicas(model, strategy, x)
    assert np.abs(local - one_device).max() > 1e-3 * np.abs(one_device).max()
    model.set_weights(weights)
    syncbn.convert(model, verbose=False)
    np.testing.assert_array_equal(np.asarray(model(x)), inference)
    assert_close("outputs", on_replicas(model, strategy, x), one_device, tolerance)
    for own, its in zip(model.get_weights(), plain.get_weights(), strict=True):
        # A moving mean behind another normalization is next to nothing: relative to 1 at least.
        assert_close("weights", [*own.ravel(), 1.0], [*its.ravel(), 1.0], tolerance)


def test_a_converted_model_is_one_device_with_layers_in_every_place():
    assert_converted_is_one_device(lambda: randomized(places()), 1e-11)


@pytest.mark.models
def test_a_converted_backbone_within_a_model_is_one_device():
    assert_converted_is_one_device(nested, 1e-10)


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_application_is_one_device(family):
    assert_converted_is_one_device(lambda: application(family), 1e-10)
