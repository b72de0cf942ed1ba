"""fold on whole models of keras.applications, with random weights and statistics."""

import keras
import numpy as np
import pytest
from keras import layers
from tests.contract.test_folding import count
from tests.harness import assert_close

from syncbn.folding import fold, plan_folding

# What is folded and what is left, and the size of the images. DenseNet normalizes what it has
# concatenated or pooled before it convolves.
MODELS = {
    "MobileNetV2": (52, 0, 32),
    "ResNet50": (53, 0, 64),
    "EfficientNetB0": (49, 0, 64),
    "InceptionV3": (94, 0, 96),
    "Xception": (40, 0, 96),
    "DenseNet121": (59, 62, 64),
}


def made(name, size):
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    # Those of a new layer do nothing. With smaller variances values grow from layer to layer, until
    # float32 has few digits left of them, folded or not.
    ranges = {"gamma": (0.7, 1.3), "beta": (-0.3, 0.3)}
    ranges |= {"moving_mean": (-0.3, 0.3), "moving_variance": (1.0, 3.0)}
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            for variable in layer.weights:
                variable.assign(rng.uniform(*ranges[variable.name], variable.shape))
    return model


@pytest.mark.models
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_keras_applications_folds(name):
    folded, left, size = MODELS[name]
    model = made(name, size)
    plan = plan_folding(model)
    assert (len(plan.folded), len(plan.left)) == (folded, left) == (folded, count(model) - folded)
    if left:
        reasons = {one.reason.split('"')[-1] for one in plan.left}
        assert reasons == {" (Concatenate)", " (AveragePooling2D)", " (MaxPooling2D)"}
    result = fold(model, verbose=False)
    assert count(result) == left
    assert len(result.layers) == len(model.layers) - folded
    batch = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype("f4")
    own, its = (np.asarray(one(batch, training=False)) for one in (result, model))
    assert_close("outputs", own, its, 1e-5)
    kept = {layer.name: layer for layer in model.layers}
    into = {one.into for one in plan.folded}
    for layer in result.layers:
        if layer.name not in into:
            for new, old in zip(layer.get_weights(), kept[layer.name].get_weights(), strict=True):
                np.testing.assert_array_equal(new, old)
