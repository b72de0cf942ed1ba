"""convert and revert: the layers are others, and everything else is what it was."""

import json
import sys

import keras
import numpy as np
import pytest
from tests.harness import numbers
from tests.processes import python
from tests.zoo import PATHS, Subclassed, places, randomized

import syncbn
from syncbn.conversion import convert, in_place, plan_conversion, revert, reverted
from syncbn.conversion.plan import batch_normalizations

PLAIN = keras.layers.BatchNormalization
SYNC = syncbn.SyncBatchNormalization


def layers(model):
    return dict(batch_normalizations(model))


def classes(model):
    return {type(layer) for layer in layers(model).values()}


def data(model, size=24):
    rng = np.random.default_rng(1)
    shape = (size, 4, 5) if model.name == "places" else (size, 3)
    outputs = model.output_shape[-1] if model.name.startswith("sequential") else 1
    return rng.normal(size=shape).astype("f4"), rng.normal(size=(size, outputs)).astype("f4")


def compiled(model, seed=0):
    model.build((None, 4, 5) if model.name == "places" else (None, 3))
    randomized(model, seed)
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def bits(model):
    arrays = [numbers(weight) for weight in [*model.weights, *model.optimizer.variables]]
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


# What is to be the very same object before and after, and what of the same value.
SAME_OBJECT = (
    *("gamma", "beta", "moving_mean", "moving_variance", "dtype_policy"),
    *("beta_initializer", "gamma_initializer", "moving_mean_initializer"),
    *("moving_variance_initializer", "gamma_regularizer", "beta_constraint", "_inbound_nodes"),
)
SAME_VALUE = ("name", "path", "axis", "momentum", "epsilon", "center", "scale", "trainable")


def state(layer):
    objects = {name: id(getattr(layer, name)) for name in SAME_OBJECT}
    return objects | {name: getattr(layer, name) for name in (*SAME_VALUE, "built", "input_spec")}


@pytest.mark.parametrize("make", [places, Subclassed])
def test_every_layer_is_converted_and_reverted_and_keeps_all_that_it_has(make, capsys):
    model = compiled(make())
    x, y = data(model)
    model.fit(x, y, verbose=0)
    found = layers(model)
    if make is places:
        assert sorted(found) == sorted(PATHS)
    states, before = {path: state(layer) for path, layer in found.items()}, bits(model)
    optimizer, outputs = model.optimizer, model.predict(x, verbose=0)
    assert convert(model) is model
    said = capsys.readouterr().err
    assert said == f"syncbn: {model.name}: {len(found)} layers -> SyncBatchNormalization.\n"
    for step, wanted in ((lambda: None, SYNC), (lambda: revert(model, verbose=False), PLAIN)):
        step()
        assert classes(model) == {wanted}
        assert {path: id(layer) for path, layer in layers(model).items()} == {
            path: id(layer) for path, layer in found.items()
        }
        assert {path: state(layer) for path, layer in layers(model).items()} == states
        assert model.optimizer is optimizer
        assert bits(model) == before
        np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)
    assert capsys.readouterr().err == ""


def test_training_goes_on_as_that_of_a_model_made_with_the_layer():
    """Bit for bit, with the optimizer's slots and iteration; and near Keras's layer."""
    model, other, plain = (compiled(Subclassed(kind), 0) for kind in (PLAIN, SYNC, PLAIN))
    x, y = data(model)
    for each in (model, plain):
        each.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    other.optimizer.build(other.trainable_variables)
    other.set_weights(model.get_weights())
    for own, its in zip(other.optimizer.variables, model.optimizer.variables, strict=True):
        own.assign(np.array(numbers(its)))  # JAX gives its arrays away to the next step
    convert(model, verbose=False)
    histories = [
        each.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history
        for each in (model, other, plain)
    ]
    assert int(numbers(model.optimizer.iterations)) == 12
    assert bits(model) == bits(other)
    assert histories[0] == histories[1]
    assert bits(model) != bits(plain)
    np.testing.assert_allclose(histories[0]["loss"], histories[2]["loss"], rtol=1e-4)


def test_a_reverted_model_trains_as_keras_does():
    model, plain = (compiled(Subclassed(kind)) for kind in (SYNC, PLAIN))
    x, y = data(model)
    model.train_on_batch(x, y)  # a step is traced with the synchronized layers
    plain.set_weights(randomized(model).get_weights())
    for each in (model, plain):
        each.optimizer = None
        revert(each, verbose=False)
        each.compile(keras.optimizers.SGD(0.01), "mse")
        each.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    for own, its in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(own, its)


def test_compiled_steps_are_traced_anew():
    """Without `compile`, which would: by moving statistics that Keras's layer never makes."""
    first = PLAIN(name="first")
    model = compiled(keras.Sequential([keras.Input((3,)), first, keras.layers.Dense(1)]))
    x, y = data(model)
    model.train_on_batch(x, y)
    convert(model, unbiased_moving_variance=True, momentum=0.0, verbose=False)
    model.train_on_batch(x, y)
    expected = x.astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(numbers(first.moving_variance), expected, rtol=1e-5)


class Own(PLAIN):
    """A class of its own."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training, mask=mask) * 2.0


class OwnSynchronized(SYNC):
    """The user's counterpart of it."""

    def call(self, inputs, training=None, mask=None, weights=None):
        return super().call(inputs, training, mask, weights) * 2.0


def with_own():
    model = keras.Sequential([keras.Input((3,)), PLAIN(name="a"), Own(name="own"), PLAIN(name="b")])
    return randomized(model)


def test_a_class_of_its_own_is_left_and_reported_or_mapped(capsys):
    model = with_own()
    x = data(model)[0]
    outputs = model.predict(x, verbose=0)
    convert(model)
    assert "2 layers -> SyncBatchNormalization; 1 left as they are, as own" in (
        capsys.readouterr().err
    )
    assert [type(layer) for layer in model.layers] == [SYNC, Own, SYNC]
    own = model.get_layer("own")
    convert(model, custom=lambda layer: OwnSynchronized(group_size=1, axis=layer.axis))
    assert type(own) is OwnSynchronized
    assert (own.name, own.group_size) == ("own", 1)
    np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)
    assert plan_conversion(model, to_plain=True).left[0].reason == (
        "OwnSynchronized is a class of its own"
    )
    revert(model, custom=lambda layer: Own(), verbose=False)  # noqa: ARG005 - it takes the layer
    assert [type(layer) for layer in model.layers] == [PLAIN, Own, PLAIN]
    np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)


def kept(model):
    """All that a layer holds, by name."""
    return {
        path: (type(layer), {name: id(value) for name, value in vars(layer).items()})
        for path, layer in layers(model).items()
    }


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda layer: PLAIN(), "Received: BatchNormalization, for the layer 'own'"),  # noqa: ARG005
        (lambda layer: SYNC(center=False), "center=False instead of True"),  # noqa: ARG005
        (lambda layer: layer, "Received: Own"),
        (lambda layer: 1, "Received: int"),  # noqa: ARG005
    ],
)
def test_a_function_that_gives_another_layer_is_refused(made, words):
    model = with_own()
    before = kept(model)
    with pytest.raises(syncbn.InputError, match="new SyncBatchNormalization") as error:
        convert(model, custom=made)
    assert words in str(error.value)
    assert kept(model) == before


def test_nothing_is_half_done_on_an_error(monkeypatch):
    model = compiled(Subclassed())
    x, y = data(model)
    model.fit(x, y, verbose=0)
    before, trained, function = kept(model), bits(model), model.train_function
    become, calls = in_place._become, []

    def failing(layer, made):
        become(layer, made)
        calls.append(layer)
        if len(calls) == 4:
            raise MemoryError("the fourth")

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "_become", failing)
        with pytest.raises(MemoryError, match="the fourth"):
            convert(model)
    assert len(calls) == 4
    assert kept(model) == before
    assert bits(model) == trained
    assert model.train_function is function


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale": False}, "scale=False. Leave it out"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"group_sise": 2}, "group_sise=2"),
        ({"group_size": 0}, "an integer of at least 1"),
        ({"momentum": None}, "a number as momentum"),
    ],
)
def test_arguments_that_cannot_be_set_are_refused_before_anything_changes(arguments, words):
    model = places()
    before = kept(model)
    with pytest.raises(syncbn.InputError) as error:
        convert(model, **arguments)
    assert words in str(error.value)
    assert kept(model) == before


def test_arguments_are_set_on_every_new_layer_and_lost_ones_said(capsys):
    model = places()
    convert(model, group_size=1, momentum=0.5, axis_name="data", verbose=False)
    for layer in layers(model).values():
        assert (layer.group_size, layer.momentum, layer.axis_name) == (1, 0.5, "data")
        assert layer.get_config()["group_size"] == 1
    planned = plan_conversion(model, to_plain=True, momentum=0.6)
    lost = {"group_size": 1, "axis_name": "data"}
    assert {path: one.lost for path, one in zip(PATHS, planned.replaced, strict=False)} == (
        dict.fromkeys(PATHS, lost)
    )
    revert(model, momentum=0.6)
    assert "without their axis_name, group_size." in capsys.readouterr().err
    assert {layer.momentum for layer in layers(model).values()} == {0.6}
    assert layers(model)["first"].get_config().keys() == PLAIN().get_config().keys()


def test_a_plan_is_data_and_changes_nothing():
    model = with_own()
    before = kept(model)
    planned = plan_conversion(model, group_size=2)
    assert json.loads(json.dumps(planned.as_dict())) == {
        "model": model.name,
        "goal": "SyncBatchNormalization",
        "replaced": [
            {
                "path": path,
                "old_class": "BatchNormalization",
                "new_class": "SyncBatchNormalization",
                "arguments": {"group_size": 2},
                "lost": {},
            }
            for path in ("a", "b")
        ],
        "left": [{"path": "own", "old_class": "Own", "reason": "Own is a class of its own"}],
    }
    assert kept(model) == before
    none = plan_conversion(keras.Sequential([keras.layers.Dense(1)], name="dense"))
    assert str(none) == "dense: there is no layer to become SyncBatchNormalization."


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: SYNC(activation="relu"), "activation='relu' inside"),
        (lambda: SYNC(), "called with weights="),
    ],
)
def test_what_keras_cannot_do_is_not_reverted(layer, words):
    inputs, weights = keras.Input((3,)), keras.Input(())
    norm = layer()
    weighted = {} if norm.activation else {"weights": weights}
    hidden = SYNC(name="fine")(keras.layers.Dense(3)(inputs))
    model = keras.Model([inputs, weights], norm(hidden, **weighted))
    before = kept(model)
    with pytest.raises(syncbn.InputError) as error, reverted(model):
        pass
    assert words in str(error.value)
    with pytest.raises(syncbn.InputError, match="1 that cannot"):
        revert(model)
    assert kept(model) == before


def test_the_average_of_all_batches_loses_its_counter_and_gets_it_back():
    model = keras.Sequential([keras.Input((3,)), SYNC(momentum=None)])
    model(np.ones((4, 3), "f4"), training=True)
    with reverted(model):
        assert len(model.weights) == 4
        assert model.layers[0].momentum == PLAIN().momentum
    assert len(model.weights) == 5
    assert model.layers[0].momentum is None
    model(np.ones((4, 3), "f4"), training=True)
    assert int(numbers(model.weights[-1])) == 2
    revert(model, verbose=False)
    assert [w.name for w in model.weights] == ["gamma", "beta", "moving_mean", "moving_variance"]
    model(np.ones((4, 3), "f4"), training=True)


def test_a_layer_that_is_not_built_yet_is_built_as_what_it_is_now():
    layer = PLAIN(renorm=True) if "renorm" in PLAIN().get_config() else PLAIN()
    unbuilt = SYNC(momentum=None)
    convert(layer, verbose=False)
    revert(unbuilt, verbose=False)
    for each in (layer, unbuilt):
        each.build((None, 3))
        assert each.built
    assert type(layer) is SYNC
    assert not hasattr(unbuilt, "num_batches_tracked")
    layer(np.ones((4, 3), "f4"), training=True)


@pytest.mark.parametrize("whole", [True, False])
def test_the_callbacks_files_open_where_syncbn_is_not_installed(tmp_path, whole):
    """And their weights alone in the code that makes plain layers, within layers too."""
    path = tmp_path / ("model.keras" if whole else "model.weights.h5")
    model = compiled(Subclassed(SYNC)) if not whole else compiled(sequential())
    x, y = data(model)
    before = [type(layer) for layer in layers(model).values()]
    callback = syncbn.PortableCheckpoint(path, save_weights_only=not whole)
    model.fit(x, y, verbose=0, epochs=2, callbacks=[callback])
    assert [type(layer) for layer in layers(model).values()] == before
    if not whole:
        plain = compiled(Subclassed(), seed=1)
        plain.optimizer.build(plain.trainable_variables)
        plain.load_weights(path)
        np.testing.assert_array_equal(plain.predict(x, verbose=0), model.predict(x, verbose=0))
        return
    np.save(tmp_path / "x.npy", x)
    code = f"""
import sys
sys.modules["syncbn"] = None
import keras, numpy as np
model = keras.saving.load_model({str(path)!r})
assert int(model.optimizer.iterations) == 2
np.save({str(tmp_path / "y.npy")!r}, model.predict(np.load({str(tmp_path / "x.npy")!r}), verbose=0))
"""
    python(code)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), model.predict(x, verbose=0))


def sequential():
    return keras.Sequential([keras.Input((3,)), SYNC(momentum=None), PLAIN(), SYNC(group_size=1)])


def test_the_callback_refuses_a_model_that_cannot_be_reverted_before_it_trains(tmp_path):
    model = keras.Sequential([keras.Input((3,)), SYNC(activation="relu")])
    model.compile("sgd", "mse")
    before = model.get_weights()
    callback = syncbn.PortableCheckpoint(tmp_path / "model.keras")
    with pytest.raises(syncbn.InputError, match="activation='relu' inside"):
        model.fit(np.ones((4, 3), "f4"), np.ones((4, 3), "f4"), callbacks=[callback], verbose=0)
    for own, its in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(own, its)


def test_a_model_of_something_else_is_refused():
    with pytest.raises(syncbn.InputError, match=r"model or a layer of Keras 3. Received: builtins"):
        convert([keras.layers.Dense(1)])
    assert "tf_keras" not in sys.modules
