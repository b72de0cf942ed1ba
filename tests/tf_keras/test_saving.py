"""Files of every format of tf_keras: nothing is lost, nothing of training is in what serves."""

import warnings

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import syncbn
from syncbn.tf_keras import SyncBatchNormalization
from tests.processes import python
from tests.replicas.tensorflow import mirrored_strategy

ARGUMENTS = {
    "axis": 1,
    "momentum": None,
    "epsilon": 1e-4,
    "scale": False,
    "beta_initializer": "ones",
    "moving_variance_initializer": tf_keras.initializers.Constant(3.0),
    "beta_regularizer": tf_keras.regularizers.L2(0.1),
    "beta_constraint": tf_keras.constraints.NonNeg(),
    "renorm": True,
    "renorm_clipping": {"rmax": 2.0, "dmax": 0.5},
    "renorm_momentum": 0.7,
    "group_assignment": [[1], [0]],
    "unbiased_moving_variance": True,
    "activation": "elu",
    "nan_check": True,
    "name": "norm",
    "dtype": "mixed_bfloat16",
    "trainable": False,
}
X = np.random.default_rng(1).normal(2, 3, (6, 4)).astype("f4")


@pytest.fixture
def model():
    """Of two replicas, with all arguments, and weights that are no initial values."""
    with mirrored_strategy(2).scope():
        model = tf_keras.Sequential(
            [
                tf_keras.Input((4,)),
                SyncBatchNormalization(**ARGUMENTS),
                SyncBatchNormalization(virtual_batch_size=3, name="ghost"),
                tf_keras.layers.Dense(2),
            ]
        )
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(1, 2, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def assert_same(model, other):
    for name in ("norm", "ghost"):
        assert type(other.get_layer(name)) is SyncBatchNormalization
        assert other.get_layer(name).get_config() == model.get_layer(name).get_config()
    for own, its in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(own, its)
    np.testing.assert_array_equal(other(X).numpy(), model(X).numpy())


def test_a_configuration_has_every_argument(model):
    config = model.get_layer("norm").get_config()
    for name in ("momentum", "renorm_clipping", "group_assignment", "activation", "nan_check"):
        assert config[name] == ARGUMENTS[name]
    assert type(config["group_assignment"]) is list
    assert SyncBatchNormalization(fused=False).get_config()["fused"] is False
    for layer in (SyncBatchNormalization(**ARGUMENTS), SyncBatchNormalization(fused=True)):
        again = SyncBatchNormalization.from_config(layer.get_config())
        assert again.get_config() == layer.get_config()


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "folder"])
def test_a_saved_model_is_the_same(model, tmp_path, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are saving your model as an HDF5 file")
        model.save(tmp_path / name)
    assert_same(model, tf_keras.models.load_model(tmp_path / name))
    with mirrored_strategy(2).scope():
        assert_same(model, tf_keras.models.load_model(tmp_path / name))


@pytest.mark.parametrize("name", ["w.weights.h5", "w.h5", "checkpoint"])
def test_saved_weights_are_the_same_on_every_replica(model, tmp_path, name):
    model.save_weights(tmp_path / name)
    strategy = mirrored_strategy(2)
    with strategy.scope():
        other = tf_keras.models.clone_model(model)
        other.load_weights(tmp_path / name)
    assert_same(model, other)
    for weight in other.get_layer("norm").weights:
        copies = strategy.experimental_local_results(weight)
        assert len({copy.numpy().tobytes() for copy in copies}) == 1


def test_a_checkpoint_holds_weights_and_nothing_of_the_arguments(model, tmp_path):
    path = tf.train.Checkpoint(norm=model.get_layer("norm")).write(str(tmp_path / "checkpoint"))
    names = {name.split("/")[1] for name, _ in tf.train.list_variables(path) if "norm/" in name}
    assert "moving_mean" in names
    graph = tf.train.load_checkpoint(path).get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
    assert b"moving_mean" in graph
    assert b"group_assignment" not in graph


def operations(loaded):
    graph = loaded.graph.as_graph_def()
    return {n.op for n in [*graph.node, *(n for f in graph.library.function for n in f.node_def)]}


def test_what_is_exported_is_inference_without_a_collective(model, tmp_path):
    model.export(tmp_path / "export")
    model.save(tmp_path / "saved")
    expected = model(X).numpy()
    for folder, signature in (("export", "serve"), ("saved", "serving_default")):
        loaded = tf.saved_model.load(str(tmp_path / folder)).signatures[signature]
        (served,) = loaded(tf.constant(X)).values()
        np.testing.assert_array_equal(served.numpy(), expected)
        found = operations(loaded)
        assert "Rsqrt" in found  # it looks in the right place
        assert not {op for op in found if op.startswith(("Collective", "Nccl", "Assert", "Assign"))}


@pytest.mark.frameworks  # a process that starts anew
def test_a_saved_model_without_the_class_serves_and_refuses_to_train(tmp_path):
    model = tf_keras.Sequential([tf_keras.Input((4,)), SyncBatchNormalization(name="norm")])
    model.save(tmp_path / "saved")
    printed = python(
        f"import sys, numpy as np, tf_keras\nx = np.ones((2, 4), 'f4')\n"
        f"model = tf_keras.models.load_model({str(tmp_path / 'saved')!r})\n"
        "assert 'syncbn' not in sys.modules\nprint(float(model(x)[0, 0]))\n"
        "try: model(x, training=True)\nexcept Exception as error: print(error)"
    )
    assert float(printed.split()[0]) == pytest.approx((1 + 1e-3) ** -0.5)
    assert "Layer norm requires its class for training" in printed
    assert "Import syncbn.tf_keras before" in printed


@pytest.mark.parametrize(
    ("layer_class", "arguments"),
    [
        (tf_keras.layers.BatchNormalization, {"synchronized": True}),
        (tf_keras.layers.BatchNormalization, {"renorm": True, "renorm_clipping": {"rmax": 2.0}}),
        (tf_keras.layers.BatchNormalization, {"virtual_batch_size": 3}),
        (tf_keras.layers.experimental.SyncBatchNormalization, {}),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_configurations_of_tf_keras_s_own_layers_are_taken(layer_class, arguments, built):
    old = layer_class(axis=-1, momentum=0.7, name="old", **arguments)
    if built and not old.virtual_batch_size:
        old.build((None, 5, 4))
    config = old.get_config()
    assert "synchronized" not in config  # what tf_keras loses
    layer = SyncBatchNormalization.from_config({**config, "synchronized": True})
    layer.build((None, 5, 4))
    assert (layer.momentum, layer.name, layer.axis) == (0.7, "old", [2])
    assert {**layer.get_config(), **arguments, "synchronized": True}["momentum"] == 0.7
    assert layer.get_config()["renorm"] is bool(arguments.get("renorm"))
    assert layer.get_config()["virtual_batch_size"] == arguments.get("virtual_batch_size")


def test_the_axis_of_a_built_layer_with_virtual_batches_is_not_believed():
    """tf_keras counts an axis of its own into it, and fails itself with its configuration."""
    old = tf_keras.layers.BatchNormalization(virtual_batch_size=3)
    old.build((None, 5, 4))
    assert old.get_config()["axis"] == [3]
    with pytest.raises(syncbn.InputError, match=r"axis=\[3\].* Set config\['axis'\]"):
        SyncBatchNormalization.from_config(old.get_config())
    layer = SyncBatchNormalization.from_config({**old.get_config(), "axis": -1})
    layer.build((None, 5, 4))
    assert layer.axis == [2]


def test_an_old_file_with_the_deprecated_class_opens_with_this_one(tmp_path):
    old = tf_keras.layers.experimental.SyncBatchNormalization
    model = tf_keras.Sequential([tf_keras.Input((4,)), old(name="norm", momentum=0.6)])
    model.set_weights([np.random.default_rng(0).random(4) + 1 for _ in range(4)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are saving your model as an HDF5 file")
        model.save(tmp_path / "old.h5")
    loaded = tf_keras.models.load_model(
        tmp_path / "old.h5", custom_objects={"SyncBatchNormalization": SyncBatchNormalization}
    )
    assert type(loaded.get_layer("norm")) is SyncBatchNormalization
    assert loaded.get_layer("norm").momentum == 0.6
    np.testing.assert_array_equal(loaded(X).numpy(), model(X).numpy())
