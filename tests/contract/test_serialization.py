"""Saved, cloned, rebuilt: still synchronized, still a BatchNormalization."""

import subprocess
import sys

import numpy as np
import pytest
from tests.harness import numbers
from tests.which_keras import TF_KERAS, SyncBatchNormalization, keras, name_of

ARGUMENTS = {
    "axis": 1,
    "momentum": 0.8,
    "epsilon": 1e-4,
    "center": False,
    "scale": True,
    "beta_initializer": "ones",
    "gamma_initializer": keras.initializers.Constant(2.0),
    "moving_mean_initializer": keras.initializers.Constant(0.5),
    "moving_variance_initializer": keras.initializers.Constant(3.0),
    "gamma_regularizer": keras.regularizers.L2(0.1),
    "beta_constraint": keras.constraints.NonNeg(),
    "renorm": True,
    "renorm_clipping": {"rmax": 2.0, "dmax": 0.5},
    "renorm_momentum": 0.7,
    "group_assignment": [[1, 0], [2]],
    "unbiased_moving_variance": True,
    "activation": "leaky_relu",
    "nan_check": True,
    "save": "input",
    "name": "my_norm",
    "dtype": "mixed_bfloat16",
    "trainable": False,
}

# The arguments that Keras's layer does not have, each with a value of its own.
OWN = {
    "group_size": 2,
    "group_assignment": [[0, 2], [1]],
    "virtual_batch_size": 8,
    "unbiased_moving_variance": True,
    "activation": "elu",
    "nan_check": True,
    "save": "output",
    "axis_name": "data",
    "process_group": [0, 1],
}
if TF_KERAS:
    del OWN["axis_name"], OWN["process_group"]


@pytest.fixture
def model():
    model = keras.Sequential(
        [keras.Input((3, 4)), SyncBatchNormalization(name="norm"), keras.layers.Dense(2)]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 2, w.shape) for w in model.get_weights()])
    return model


def test_it_is_a_keras_batch_normalization():
    layer = SyncBatchNormalization()
    assert isinstance(layer, keras.layers.BatchNormalization)
    assert layer.synchronized is True


def test_signature_is_that_of_keras_without_synchronized():
    import inspect

    ours = inspect.signature(SyncBatchNormalization.__init__).parameters
    theirs = dict(inspect.signature(keras.layers.BatchNormalization.__init__).parameters)
    del theirs["synchronized"]
    # Keras has these since 3.13; ours are there on any.
    later = {"renorm", "renorm_clipping", "renorm_momentum"} - set(theirs)
    of_its_base = {"fused", *later} if TF_KERAS else set()
    # By keyword and default; the order too, since old code passes some by position.
    positional = [
        (p.name, p.default)
        for p in ours.values()
        if p.name not in later and p.kind is not p.KEYWORD_ONLY
    ]
    assert positional == [(p.name, p.default) for p in theirs.values()]
    assert {p.name for p in ours.values() if p.kind is p.KEYWORD_ONLY} == {*OWN, *of_its_base}


def test_weights_have_the_names_order_and_shapes_of_keras():
    layers = [SyncBatchNormalization(), keras.layers.BatchNormalization()]
    for layer in layers:
        layer.build((None, 3, 5))
    ours, theirs = ([(w.name, w.shape, w.trainable) for w in layer.weights] for layer in layers)
    assert ours == theirs
    layers[0].set_weights(layers[1].get_weights())


def test_config_round_trip_keeps_every_argument():
    layer = SyncBatchNormalization(**ARGUMENTS)
    config = layer.get_config()
    assert "synchronized" not in config
    again = SyncBatchNormalization.from_config(config)
    assert type(again) is SyncBatchNormalization
    assert again.get_config() == config
    assert (again.axis, again.momentum, again.trainable, again.name) == (1, 0.8, False, "my_norm")


@pytest.mark.parametrize(
    ("name", "value"), [*OWN.items(), ("momentum", None), ("renorm", True), ("activation", None)]
)
def test_each_argument_of_its_own_is_kept_by_config_json_and_a_keras_file(name, value, tmp_path):
    model = keras.Sequential(
        [keras.Input((3,)), SyncBatchNormalization(**{name: value}, name="norm")]
    )
    for again in (
        keras.models.clone_model(model),
        keras.models.model_from_json(model.to_json()),
        saved_and_loaded(model, tmp_path / "model.keras"),
    ):
        layer = again.get_layer("norm")
        assert layer.get_config()[name] == model.get_layer("norm").get_config()[name] == value
        names, its = (list(map(name_of, one.weights)) for one in (layer, model.get_layer("norm")))
        assert names == its


def saved_and_loaded(model, path):
    model.save(path)
    return keras.models.load_model(path)


def test_an_activation_is_kept_by_its_name_and_the_function_is_taken_too():
    layer = SyncBatchNormalization(activation=keras.activations.relu)
    assert layer.get_config()["activation"] == "relu"
    assert SyncBatchNormalization(activation="linear").get_config()["activation"] is None


def test_training_goes_on_from_a_saved_state_as_if_nothing_had_happened(tmp_path):
    """Renormalization's own statistics and the number of batches are weights like the others."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(3, 2, (2, 16, 3)).astype("float32")
    model = keras.Sequential(
        [keras.Input((3,)), SyncBatchNormalization(renorm=True, momentum=None)]
    )
    model(first, training=True)
    again = saved_and_loaded(model, tmp_path / "model.keras")
    by_weights = keras.models.clone_model(model)
    model.save_weights(tmp_path / "model.weights.h5")
    by_weights.load_weights(tmp_path / "model.weights.h5")
    expected = numbers(model(second, training=True))
    for other in (again, by_weights):
        np.testing.assert_array_equal(numbers(other(second, training=True)), expected)
        for own, its in zip(other.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(own, its)


def test_a_config_of_keras_batch_normalization_is_taken():
    # Keras itself makes none that is synchronized but on TensorFlow.
    config = keras.layers.BatchNormalization(momentum=0.7).get_config() | {"synchronized": True}
    layer = SyncBatchNormalization.from_config(config)
    assert layer.momentum == 0.7


def test_inference_is_bitwise_that_of_keras(model):
    x = np.random.default_rng(1).normal(5, 3, (7, 3, 4)).astype("float32")
    plain = keras.layers.BatchNormalization()
    plain.build((None, 3, 4))
    plain.set_weights(model.get_layer("norm").get_weights())
    np.testing.assert_array_equal(numbers(model.get_layer("norm")(x)), numbers(plain(x)))


def test_clone_model_keeps_it_synchronized(model):
    clone = keras.models.clone_model(model)
    assert type(clone.get_layer("norm")) is SyncBatchNormalization


def test_keras_file_keeps_it_synchronized(model, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("norm")) is SyncBatchNormalization
    for own, its in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(own, its)


# Each is a process that starts anew: of the other backends one is enough.
IMPORTS = ["import syncbn; syncbn.SyncBatchNormalization; import keras"]
if TF_KERAS:  # whose files Keras 3 opens too
    IMPORTS = [
        pytest.param(imports, marks=pytest.mark.frameworks)
        for imports in ("import syncbn.tf_keras; import tf_keras as keras", "import keras, syncbn")
    ]
elif keras.backend.backend() == "tensorflow":
    IMPORTS.append("import keras, syncbn")


@pytest.mark.parametrize("imports", IMPORTS)
def test_a_fresh_process_that_imports_syncbn_loads_it(model, tmp_path, imports):
    model.save(tmp_path / "model.keras")
    code = (
        f"{imports}\nmodel = keras.models.load_model({str(tmp_path / 'model.keras')!r})\n"
        "print(type(model.get_layer('norm')).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip() == "SyncBatchNormalization", result.stderr
