"""The models of the ResNet-50 benchmark are one model with other normalizations."""

from pathlib import Path

import keras
import numpy as np
import pytest

import syncbn

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def resnet(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import resnet

    return resnet


def tiny():
    """Two normalizations and a branch; statistics and weights that are no defaults."""
    layers = keras.layers
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="convolution")(image)
    x = layers.BatchNormalization(epsilon=1.001e-5, name="first")(x)
    y = layers.BatchNormalization(momentum=0.9, name="second")(layers.ReLU()(x))
    pooled = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    model = keras.Model(image, layers.Dense(5, activation="softmax")(pooled))
    rng = np.random.default_rng(1)
    model.set_weights([rng.uniform(0.5, 2, size=w.shape) for w in model.get_weights()])
    return model


@pytest.mark.parametrize(
    ("variant", "kind", "synchronized"),
    [
        ("syncbn", syncbn.SyncBatchNormalization, True),
        ("keras_sync", keras.layers.BatchNormalization, True),
        ("keras_local", keras.layers.BatchNormalization, False),
        ("fused_local", None, False),
    ],
)
def test_conversion_keeps_names_weights_layers_and_inference(resnet, variant, kind, synchronized):
    model = tiny()
    copy = resnet.converted(model, resnet.VARIANTS[variant])
    assert copy is not model
    assert len(copy.layers) == len(model.layers)
    # Keras gives the clone an input of its own, which has no weights.
    names, others = ({layer.name for layer in one.layers} for one in (copy, model))
    assert len(names ^ others) == 2
    assert names - others == {copy.input.name}
    for name in ("first", "second"):
        own, other = copy.get_layer(name), model.get_layer(name)
        assert type(own) is (kind or resnet.FusedLocal)
        assert own.synchronized is synchronized
        assert (own.epsilon, own.momentum) == (other.epsilon, other.momentum)
        assert (own.scale, own.center) == (other.scale, other.center)
    for own, other in zip(copy.weights, model.weights, strict=True):
        assert own is not other
        np.testing.assert_array_equal(own.numpy(), other.numpy())
    if variant == "fused_local":
        return  # it is for training alone
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(copy(images), model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.benchmarks
def test_variants_that_synchronize_start_with_the_same_loss_and_the_local_one_does_not(resnet):
    strategy = resnet.mirrored_strategy(2)
    figures = resnet.measure(tiny(), strategy, rounds=2)
    loss = {name: found["first_loss"] for name, found in figures.items()}
    assert abs(loss["syncbn"] - loss["keras_sync"]) < 1e-5
    assert abs(loss["keras_local"] - loss["keras_sync"]) > 1e-3
    for found in figures.values():
        assert found["first_step_seconds"] > 0
        assert found["times_as_fast_as_keras_sync"] > 0


@pytest.mark.parametrize("loss", [1.1, float("nan")])
def test_figures_of_unequal_work_are_refused(resnet, loss):
    resnet.check_losses({"syncbn": 1.0, "keras_sync": 1.0005})
    with pytest.raises(RuntimeError, match="Equal work requires first losses"):
        resnet.check_losses({"syncbn": loss, "keras_sync": 1.0})
