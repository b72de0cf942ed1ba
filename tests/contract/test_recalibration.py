"""`recalibrate` on one device: population statistics as NumPy has them, or nothing at all."""

import json

import keras
import numpy as np
import pytest
from tests.harness import numbers
from tests.recalibration import (
    EPSILON,
    SIZES,
    assert_population,
    data,
    expected,
    held,
    in_float64,
    make_model,
    state_of,
    statistics,
)

import syncbn
from syncbn import InputError
from syncbn.moments import merge
from syncbn.recalibration import recalibrate

KEPT = r"The moving statistics are what they were"


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index], np.zeros(len(self.batches[index]))


SOURCES = {
    "PyDataset": Batches,
    "generator of (x, y)": lambda batches: ((x, x[:, 0]) for x in batches),
    "generator of x": lambda batches: ((x,) for x in batches),
}


@pytest.fixture(autouse=True)
def _float64():
    with in_float64():
        yield


@pytest.mark.parametrize("source", SOURCES)
def test_statistics_are_those_of_all_elements_each_counted_once(source):
    model, batches = make_model(), data()
    report = recalibrate(model, SOURCES[source](batches))
    wanted = expected(batches)
    assert_population(model, wanted, 1e-11)
    assert report.steps == len(SIZES)
    assert [one.path for one in report.layers] == ["first", "second"]
    assert [one.elements for one in report.layers] == [one.count for one in wanted]
    assert json.loads(json.dumps(report.as_dict()))["layers"][1]["elements"] == wanted[1].count


def test_arrays_are_taken_in_their_order_in_batches_of_the_size_given():
    x = np.concatenate(data())
    for arrays in (x, (x, x), (x, x, x[:, 0, 0])):
        model = make_model(masked=False)
        recalibrate(model, arrays, batch_size=10)
        assert_population(model, expected([x[:10], x[10:20], x[20:]], masked=False), 1e-11)


def test_steps_limits_the_batches_and_data_may_end_before():
    batches = data()
    for steps, taken in ((2, 2), (7, 3)):
        model = make_model()
        assert recalibrate(model, ((x,) for x in batches), steps).steps == taken
        assert_population(model, expected(batches[:taken]), 1e-11)


def test_a_second_call_gives_the_same_bits_whatever_the_layers_held():
    model = make_model()
    recalibrate(model, Batches(data()))
    before = held(model)
    for layer in (model.get_layer("first"), model.get_layer("second")):
        layer.moving_mean.assign(layer.moving_mean + 3)
        layer.moving_variance.assign(layer.moving_variance * 5)
    recalibrate(model, Batches(data()))
    np.testing.assert_equal(held(model), before)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_variance_at_a_large_mean_in_float32(offset):
    rng = np.random.default_rng(0)
    parts = [
        (rng.normal(size=(size, 4)) + offset + step).astype("float32")
        for step, size in enumerate((300, 200))
    ]
    model = keras.Sequential([keras.Input((4,)), syncbn.SyncBatchNormalization()])
    recalibrate(model, ((part,) for part in parts))
    rows = statistics(np.concatenate(parts).astype("float64"))
    ((_, variance),) = held(model)
    assert np.abs(variance / rows.variance - 1).max() < (1e-4 if offset == 1e3 else 1e-3)


def test_a_convolution_and_channels_that_are_not_last():
    """In float32, which Keras's convolution rounds to on JAX and torch."""
    convolution = keras.layers.Conv1D(4, 3, use_bias=False)
    norms = syncbn.SyncBatchNormalization(), keras.layers.BatchNormalization(axis=1)
    layers = [convolution, norms[0], keras.layers.ReLU(), keras.layers.Permute((2, 1)), norms[1]]
    model = keras.Sequential([keras.Input((6, 5)), *layers])
    batches = data()
    recalibrate(model, Batches(batches))
    kernel = numbers(convolution.kernel).astype("float64")
    first, second = [], []
    for x in batches:
        windows = np.stack([x[:, at : at + 4] for at in range(3)], axis=-2).astype("float64")
        rows = np.einsum("ntwc,wcf->ntf", windows, kernel).reshape(-1, 4)
        first.append(rows)
        second.append(np.maximum(normalized(rows), 0))
    wanted = [statistics(np.concatenate(rows)) for rows in (first, second)]
    assert_population(model, wanted, 1e-5)


def test_a_layer_that_is_called_twice_counts_both():
    norm = syncbn.SyncBatchNormalization(dtype="float64")
    a, b = (
        keras.Input((4,), dtype="float64", name="a"),
        keras.Input((4,), dtype="float64", name="b"),
    )
    model = keras.Model({"a": a, "b": b}, norm(a) - norm(b))
    pairs = [{"a": x[:, 1, :4], "b": x[:, 2, :4] * 2 + 1} for x in data()]
    report = recalibrate(model, ((pair,) for pair in pairs))
    rows = np.concatenate([rows for pair in pairs for rows in pair.values()]).astype("float64")
    assert_population(model, [statistics(rows)], 1e-11)
    assert report.layers[0].elements == 2 * sum(SIZES)


def test_batches_of_the_same_share_would_be_found(monkeypatch):
    """A mutant: each batch counts the same, whatever its size."""

    def merged(total, batch, _):
        share = batch._replace(count=batch.count * 0 + 1, m2=batch.m2 / batch.count)
        return merge(total, share, np)

    monkeypatch.setattr("syncbn.recalibration.merge", merged)
    model = make_model()
    recalibrate(model, Batches(data()))
    with pytest.raises(AssertionError):
        assert_population(model, expected(data()), 1e-2)


def normalized(x):
    return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + EPSILON)


def test_options_of_training_hold_and_the_statistics_are_of_the_union():
    """Virtual batches for what the next layer sees; the unbiased variance; renorm's deviation."""
    ghost = syncbn.SyncBatchNormalization(
        dtype="float64", virtual_batch_size=4, unbiased_moving_variance=True, momentum=None
    )
    renorm = syncbn.SyncBatchNormalization(dtype="float64", renorm=True)
    model = keras.Sequential([keras.Input((4,), dtype="float64"), ghost, renorm])
    batches = [batch[:, 0, :4] for batch in data()]
    recalibrate(model, ((batch,) for batch in batches))
    x = np.concatenate(batches).astype("float64")
    seen = [
        normalized(b[at : at + 4].astype("float64")) for b in batches for at in range(0, len(b), 4)
    ]
    first, second = statistics(x), statistics(np.concatenate(seen))
    first = first._replace(variance=x.var(axis=0, ddof=1))
    assert_population(model, [first, second], 1e-11)
    deviation = np.sqrt(second.variance + EPSILON)
    np.testing.assert_allclose(numbers(renorm.moving_stddev), deviation, rtol=1e-11)
    np.testing.assert_array_equal(numbers(renorm.renorm_mean), 0)
    assert int(numbers(ghost.num_batches_tracked)) == 0
    assert ghost.momentum is None
    assert ghost.virtual_batch_size == 4


class Own(keras.layers.BatchNormalization):
    pass


def test_frozen_layers_and_own_classes_keep_theirs_and_are_reported():
    frozen = keras.layers.BatchNormalization(trainable=False, name="frozen")
    own, norm = Own(name="own"), keras.layers.BatchNormalization(name="norm")
    inputs = keras.Input((4,))
    unused = syncbn.SyncBatchNormalization(name="unused")
    model = keras.Model(inputs, norm(own(frozen(inputs))))
    model.unused = unused
    unused.build((None, 4))
    frozen.moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    batches = [batch[:, 0, :4] for batch in data()]
    report = recalibrate(model, ((batch,) for batch in batches))
    assert {one.path: one.reason for one in report.left} == {
        "frozen": "it is frozen, trainable=False",
        "own": "Own is a class of its own",
        "unused": "no element came to it",
    }
    assert [one.path for one in report.layers] == ["norm"]
    assert "3 left as they are, as frozen (it is frozen" in str(report)
    np.testing.assert_array_equal(numbers(own.moving_mean), 0)
    np.testing.assert_array_equal(numbers(unused.moving_variance), 1)
    # The frozen layer is in inference, its own class too.
    rows = (np.concatenate(batches).astype("f8") - [1, 2, 3, 4]) / (1 + EPSILON)
    np.testing.assert_allclose(numbers(norm.moving_mean), rows.mean(axis=0), rtol=1e-5)


def failing(error):
    batches = data((8, 8, 8, 8))
    yield from ((batch,) for batch in batches[:3])
    raise error


def with_a_nan():
    batches = data((8, 8, 8, 8))
    batches[2][1, 0, 0] = np.nan
    return batches


FAILURES = {
    "NaN": (lambda: ((x,) for x in with_a_nan()), InputError, f"first in batch 2.*{KEPT}"),
    "data": (lambda: failing(OSError("the disk is gone")), Exception, "the disk is gone"),
    "shape": (lambda: of_two_shapes(), Exception, None),
    "no batch": (lambda: Batches([]), ValueError, None),  # on TensorFlow it is Keras's
    "no row": (lambda: np.zeros((0, 6, 5), "float32"), InputError, "at least one example"),
    "endless": (lambda: Endless(), InputError, "data that ends"),
}


def of_two_shapes():
    yield (data()[0],)
    yield (data()[0][:, :, :2],)


class Endless(Batches):
    def __init__(self):
        super().__init__(data())

    def __len__(self):
        raise NotImplementedError

    @property
    def num_batches(self):
        return None


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_everything_as_it_was(failure):
    make, error, message = FAILURES[failure]
    model = make_model()
    x = data()[0]
    output = numbers(model(x, training=False)).tobytes()
    before = state_of(model)
    with pytest.raises(error, match=message):
        recalibrate(model, make())
    assert state_of(model) == before
    assert numbers(model(x, training=False)).tobytes() == output


class Interrupted(keras.layers.Layer):
    supports_masking = True

    def call(self, inputs):
        if self.interrupts:
            raise KeyboardInterrupt
        return inputs


def test_an_interrupt_leaves_everything_as_it_was():
    last = Interrupted()
    last.interrupts = False
    model = make_model()
    model = keras.Model(model.inputs, last(model.outputs[0]))
    last.interrupts = True
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, Batches(data()))
    assert state_of(model) == before


def test_all_layers_are_assigned_or_none(monkeypatch):
    model = make_model()
    before = state_of(model)
    second = model.get_layer("second").moving_variance
    assign = type(second).assign

    def full(variable, value):
        if variable is second and np.any(np.asarray(value) != 1):
            raise MemoryError("no room")
        return assign(variable, value)

    monkeypatch.setattr(type(second), "assign", full)
    with pytest.raises(MemoryError):
        recalibrate(model, Batches(data()))
    monkeypatch.undo()
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (keras.layers.Dense(3), {}, "requires a model of Keras 3"),
        (keras.Sequential([keras.layers.Dense(3)]), {}, "requires a model that is built"),
        (None, {"steps": 0}, "steps=0"),
        (None, {"steps": True}, "steps=True"),
        ("plain", {}, "none at all"),
        ("frozen", {}, "it is frozen"),
    ],
)
def test_what_cannot_be_recalibrated_is_said(model, arguments, message):
    if model == "plain":
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    if model == "frozen":
        model = make_model()
        model.trainable = False
    with pytest.raises(InputError, match=message):
        recalibrate(model or make_model(), Batches(data()), **arguments)


def test_compiled_steps_stay_and_training_and_inference_go_on():
    """A twin that was given the statistics has the same bits after more training."""
    x = np.concatenate(data())
    y = x[:, :, :2]
    first, twin = (make_model(dtype="float32") for _ in range(2))
    for model in (first, twin):
        model.compile(keras.optimizers.SGD(0.01), "mse")
        next(one for one in model.layers if isinstance(one, keras.layers.Dropout)).rate = 0.0
        model.fit(x, y, epochs=1, shuffle=False, verbose=0)
        model.predict(x, verbose=0)
    functions = first.train_function, first.predict_function
    recalibrate(first, x)
    assert (first.train_function, first.predict_function) == functions
    twin.set_weights(first.get_weights())
    for model in (first, twin):
        model.fit(x, y, epochs=1, shuffle=False, verbose=0)
    for own, its in zip(first.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(own, its)
    np.testing.assert_array_equal(first.predict(x, verbose=0), twin.predict(x, verbose=0))


def test_a_nan_check_and_a_kept_output_are_no_obstacle():
    """On JAX neither can be compiled."""
    checked = syncbn.SyncBatchNormalization(nan_check=True, dtype="float64", name="first")
    kept = syncbn.SyncBatchNormalization(save="output", dtype="float64", gamma_initializer="zeros")
    model = make_model(first=checked, second=kept)
    recalibrate(model, Batches(data()))
    assert_population(model, expected(data()), 1e-11)
    assert (checked.nan_check, kept.save) == (True, "output")


def test_a_model_of_digits_is_as_good_again_with_its_true_statistics():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target
    norms = syncbn.SyncBatchNormalization(), keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((64,))])
    for norm in norms:
        for layer in (keras.layers.Dense(32), norm, keras.layers.ReLU(), keras.layers.Dropout(0.1)):
            model.add(layer)
    model.add(keras.layers.Dense(10, activation="softmax"))
    model.compile(
        keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model.fit(x[:1500], y[:1500], batch_size=100, epochs=5, verbose=0)
    for norm in norms:
        norm.moving_mean.assign(norm.moving_mean - 2)
    before = model.evaluate(x[1500:], y[1500:], verbose=0)[1]
    recalibrate(model, (x[:1500], y[:1500]), batch_size=100)
    after = model.evaluate(x[1500:], y[1500:], verbose=0)[1]
    assert before < 0.5 < 0.85 < after
