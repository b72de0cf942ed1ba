"""fold: the same outputs in inference, with fewer layers, for every layer that it knows."""

import keras
import numpy as np
import pytest
from keras import layers
from tests.harness import assert_close, numbers
from tests.one_device import precision

import syncbn
from syncbn.folding import fold, plan_folding

FIRST = {"data_format": "channels_first"}
IMAGE, VOLUME, SERIES = (6, 7, 4), (4, 5, 6, 3), (9, 4)
# The layer, the shape of an example, the axis of the channels.
KINDS = {
    "Dense": (lambda: layers.Dense(3), (5,), -1),
    "Dense of a series, no bias": (lambda: layers.Dense(3, use_bias=False), SERIES, -1),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cd->abd", (None, 3)), SERIES, 2),
    "EinsumDense, bias, mixed axes": (
        lambda: layers.EinsumDense("...bx,ybx->...y", 3, bias_axes="y"),
        SERIES,
        -1,
    ),
    "Conv1D": (lambda: layers.Conv1D(3, 2, dilation_rate=2, padding="causal"), SERIES, -1),
    "Conv2D": (lambda: layers.Conv2D(6, 3, use_bias=False), IMAGE, -1),
    "Conv2D, groups": (lambda: layers.Conv2D(6, 3, groups=2), IMAGE, 3),
    "Conv2D, channels first": (lambda: layers.Conv2D(5, 3, **FIRST), IMAGE, 1),
    "Conv3D": (lambda: layers.Conv3D(2, 2, strides=2), VOLUME, -1),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(3, 2), SERIES, -1),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 2, use_bias=False), IMAGE, -1),
    "Conv2DTranspose, channels first": (lambda: layers.Conv2DTranspose(3, 2, **FIRST), IMAGE, 1),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(2, 2), VOLUME, -1),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(2, depth_multiplier=3), SERIES, -1),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(3, use_bias=False), IMAGE, -1),
    "DepthwiseConv2D, channels first": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, **FIRST),
        IMAGE,
        1,
    ),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(5, 2), SERIES, -1),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(5, 2, depth_multiplier=2, use_bias=False),
        IMAGE,
        -1,
    ),
    "TimeDistributed(Dense)": (lambda: layers.TimeDistributed(layers.Dense(3)), SERIES, -1),
    "TimeDistributed(Conv1D), channels first": (
        lambda: layers.TimeDistributed(layers.Conv1D(5, 2, **FIRST)),
        IMAGE,
        2,
    ),
}


def randomized(model, seed=0):
    """The model with random weights and statistics: those of a new layer do nothing."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        low = 0.3 if variable.path.endswith(("variance", "gamma")) else -1.0
        variable.assign(rng.uniform(low, 1.5, variable.shape))
    return model


def norm(**arguments):
    return syncbn.SyncBatchNormalization(**arguments)


def batch_of(model, seed=1):
    rng = np.random.default_rng(seed)
    one = [rng.normal(size=(3, *tensor.shape[1:])) for tensor in model.inputs]
    return one[0] if len(one) == 1 else one


def outputs(model, batch):
    function = model
    if keras.backend.backend() == "tensorflow" and "channels_first" in str(model.get_config()):
        import tensorflow as tf  # which has such convolutions on a CPU by XLA alone

        function = tf.function(model, jit_compile=True, autograph=False)
    elif keras.backend.backend() == "jax":
        import jax  # where each operation by itself is compiled by itself

        function = jax.jit(model, static_argnames="training")
    found = function(batch, training=False)
    return [numbers(part) for part in (found if isinstance(found, (list, tuple)) else [found])]


def assert_same_outputs(folded, model, tolerance, batch=None):
    batch = batch_of(model) if batch is None else batch
    for own, its in zip(outputs(folded, batch), outputs(model, batch), strict=True):
        assert own.dtype == its.dtype
        assert_close("outputs", own, its, tolerance)


def count(model):
    return sum(isinstance(one, layers.BatchNormalization) for one in model._flatten_layers())


def normalized(x, layer):
    """What the layer does in inference, in float64, which Keras's does on TensorFlow alone."""
    shape = [1] * x.ndim
    shape[layer.axis] = -1
    gamma = numbers(layer.gamma) if layer.scale else np.ones(1)
    beta = numbers(layer.beta) if layer.center else np.zeros(1)
    mean, variance = numbers(layer.moving_mean), numbers(layer.moving_variance)
    mean, variance, gamma, beta = (v.reshape(shape) for v in (mean, variance, gamma, beta))
    return gamma * (x - mean) / np.sqrt(variance + layer.epsilon) + beta


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_takes_its_normalizations_in(name):
    make, shape, axis = KINDS[name]
    with precision("float64"):
        keras.config.set_dtype_policy("float64")
        try:
            x = keras.Input(shape)
            hidden = make()(x)
            first = layers.BatchNormalization(axis, center=False, epsilon=0.1)
            second = norm(axis=axis, scale=False, activation="tanh")
            model = randomized(keras.Model(x, second(first(hidden))))
            folded = fold(model, verbose=False)
            assert count(folded) == 0
            batch = batch_of(model)
            before = outputs(keras.Model(x, hidden), batch)[0]
            expected = np.tanh(normalized(normalized(before, first), second))
            # On the others Keras rounds to float32 on the way, in most layers.
            tolerance = 1e-11 if keras.backend.backend() == "tensorflow" else 2e-6
            assert_close("outputs", outputs(folded, batch)[0], expected, tolerance)
        finally:
            keras.config.set_dtype_policy("float32")


def test_time_distributed_normalization_and_models_fold_too():
    frame = keras.Input((6, 4))
    frames = keras.Model(frame, norm(axis=-1)(layers.Conv1D(3, 2)(frame)))
    x = keras.Input((5, 6, 4))
    try:
        y = layers.TimeDistributed(frames, name="frames")(x)
    except NotImplementedError:
        pytest.skip("Keras 3.0 has no models in TimeDistributed")
    y = layers.TimeDistributed(norm(axis=1))(
        layers.TimeDistributed(layers.Conv1D(5, 2, **FIRST))(y)
    )
    model = randomized(keras.Model(x, y))
    plan = plan_folding(model)
    assert [one.path.split("/")[0] for one in plan.left] == []
    folded = fold(model, verbose=False)
    assert count(folded) == 0
    assert_same_outputs(folded, model, 2e-5)


def residual():
    """Two inputs and three outputs in a dictionary, a model inside, operations besides."""
    inner = keras.Input((8, 3))
    y = layers.ReLU()(norm(name="inner_norm")(layers.Conv1D(4, 3, padding="same")(inner)))
    backbone = keras.Model(inner, y, name="backbone")
    inputs = {"b": keras.Input((8, 3), name="b"), "a": keras.Input((8, 3), name="a")}
    one, two = backbone(inputs["a"]), backbone(inputs["b"], training=False)
    y = keras.ops.concatenate([one, two * 2.0], axis=-1)
    branch = norm(name="branch_norm", activation="relu")(layers.Conv1D(4, 1, name="branch")(y))
    y = layers.Dropout(0.5)(layers.Add()([branch, one]) - 1.0)
    lead = layers.BatchNormalization(name="lead")(y)
    last = layers.BatchNormalization(name="last")(layers.Dense(2, name="dense")(lead))
    return keras.Model(inputs, {"z": last, "y": lead, "x": y[:, 0]}, name="residual")


def test_a_graph_keeps_its_structure_its_names_and_all_other_weights():
    model = randomized(residual())
    plan = plan_folding(model)
    assert [(one.path, one.into) for one in plan.folded] == [
        ("branch_norm", "branch"),
        ("last", "dense"),
        ("backbone/inner_norm", "backbone/conv1d"),
    ]
    assert [(one.path, one.reason) for one in plan.left] == [
        ("lead", 'its input is that of "dropout" (Dropout)')
    ]
    folded = fold(model, verbose=False)
    assert folded.name == model.name
    assert [tensor.name for tensor in folded.inputs] == [tensor.name for tensor in model.inputs]
    assert folded.output_names == model.output_names
    kept = {one.name for one in model.layers} - {"branch_norm"}
    assert {one.name for one in folded.layers} == kept
    assert list(folded.input) == ["b", "a"]
    rng = np.random.default_rng(0)
    batch = {name: rng.normal(size=(2, 8, 3)).astype("f4") for name in "ab"}
    own, its = folded(batch), model(batch)
    for name in ("z", "y", "x"):
        assert_close(name, numbers(own[name]), numbers(its[name]), 1e-5)
    pairs = zip(folded.get_layer("lead").weights, model.get_layer("lead").weights, strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(numbers(one), numbers(other))


def test_the_given_model_is_not_touched():
    model = randomized(residual())
    before = [numbers(weight) for weight in model.weights]
    calls = {
        id(one): (len(one._inbound_nodes), len(one._outbound_nodes)) for one in model.operations
    }
    folded = fold(model, verbose=False)
    for own, its in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numbers(own), its)
    after = {
        id(one): (len(one._inbound_nodes), len(one._outbound_nodes)) for one in model.operations
    }
    assert after == calls
    assert not {id(weight) for weight in model.weights} & {id(weight) for weight in folded.weights}
    for weight in folded.weights:
        weight.assign(numbers(weight) * 0)
    for own, its in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numbers(own), its)


def test_sequential_stays_sequential_and_weights_that_layers_prepare_come_along():
    adapted = layers.Normalization(name="prepared")
    adapted.adapt(np.random.default_rng(0).normal(3.0, 2.0, size=(50, 4)))
    model = keras.Sequential(
        [
            keras.Input((4,), name="features"),
            adapted,
            layers.Dense(6),
            norm(activation="relu"),
            layers.Lambda(lambda x: x * 2.0, name="twice"),
            layers.Dense(2),
            norm(name="last"),
        ],
        name="stack",
    )
    for one in model.layers[2:]:
        randomized(one)
    folded = fold(model, verbose=False)
    assert type(folded) is keras.Sequential
    assert [one.name for one in folded.layers] == [
        one.name for one in model.layers if not one.name.startswith("sync")
    ]
    assert folded.inputs[0].name == model.inputs[0].name == "features"
    assert_same_outputs(folded, model, 2e-6)


def test_the_line_and_the_data_say_what_was_done(capsys):
    model = residual()
    folded = fold(model)
    line = capsys.readouterr().err
    assert line == (
        "syncbn: residual: 3 of 4 batch normalizations folded; 1 left as they are, as lead (its "
        'input is that of "dropout" (Dropout)).\n'
    )
    assert f"syncbn: {plan_folding(model)}\n" == line
    assert plan_folding(model).as_dict()["left"][0]["path"] == "lead"
    fold(folded, verbose=False)
    assert capsys.readouterr().err == ""
    assert "0 of 1" in str(plan_folding(folded))
    assert "no batch normalization" in str(
        plan_folding(fold(keras.Sequential([keras.Input((1,)), layers.Dense(1)])))
    )
