"""SyncMonitor on replicas, against NumPy over the parts of their batches; and what it writes."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.harness import numbers
from tests.monitoring import assert_logged, expected

import syncbn
from syncbn._backends.tensorflow.replicas import mirrored_strategy
from syncbn.errors import NotSynchronizableError
from syncbn.monitoring import SyncMonitor

REPLICAS, ROWS, FEATURES = 2, 6, 5


def make_data(offset=0.0):
    """Two batches; what a mask leaves of replica 1's part is less; columns of their own scale."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * ROWS, 4, FEATURES)) * np.arange(1, FEATURES + 1)
    x += offset + np.linspace(0, 3, 2 * ROWS)[:, None, None]
    x[ROWS // 2 : ROWS, 1:] = 0.0
    x[-1, 1:] = 0.0
    return x.astype("float32"), rng.normal(size=(2 * ROWS, 1)).astype("float32")


def make_model(strategy):
    """Layers side by side, each of which sees the inputs as they are."""
    with strategy.scope():
        inputs = keras.Input((4, FEATURES))
        masked = keras.layers.Masking()(inputs)
        branches = [
            syncbn.SyncBatchNormalization(name="ours")(masked),
            keras.layers.BatchNormalization(name="plain")(inputs),
            keras.layers.BatchNormalization(name="theirs", synchronized=True)(inputs),
            syncbn.SyncBatchNormalization(name="virtual", virtual_batch_size=2)(inputs),
            syncbn.SyncBatchNormalization(name="first_axis", axis=1)(inputs),
        ]
        x = keras.layers.Concatenate()([keras.layers.Flatten()(one + 0.0) for one in branches])
        model = keras.Model(inputs, keras.layers.Dense(1)(x))
        model.compile("sgd", "mse", jit_compile=False)
    return model


def fit(monitor, x, y, replicas=REPLICAS, batch=ROWS):
    model = make_model(mirrored_strategy(replicas))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(
            x, y, batch_size=batch, epochs=1, shuffle=False, verbose=0, callbacks=[monitor]
        )
    said = [str(one.message) for one in caught if "SyncMonitor" in str(one.message)]
    return model, history.history, said


def parts_of(batch, axis=2, masked=False):
    """The elements of each replica's half."""
    elements = [np.moveaxis(half, axis, -1).reshape(-1, half.shape[axis]) for half in batch]
    if masked:
        return [part[np.any(part != 0, axis=1)] for part in elements]
    return elements


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    x, y = make_data()
    folder = tmp_path_factory.mktemp("logs")
    monitor = SyncMonitor(folder, interval=1)
    model, history, said = fit(monitor, x, y)
    return x, model, history, said, monitor, folder


@pytest.mark.parametrize(
    ("layer", "axis", "masked"),
    [
        *(("ours", 2, True), ("plain", 2, False), ("theirs", 2, False), ("virtual", 2, False)),
        ("first_axis", 1, False),
    ],
)
def test_distances_are_those_of_numpy_by_elements(run, layer, axis, masked):
    x, _, history, *_ = run
    halves = np.split(x[ROWS:], REPLICAS)
    wanted = expected(parts_of(halves, axis, masked))
    assert wanted["mean_distance"] > 0.05
    assert_logged(history, layer, wanted)


def test_an_alarm_names_layer_replica_and_size_once(run):
    _, model, history, (said,), monitor, _ = run
    assert "Received at training step 1: layer plain: replica 1 of 2 from replica 0, by" in said
    assert "syncbn.convert(model)" in said
    assert not any(name in said for name in ("ours", "theirs", "virtual"))
    plain = model.get_layer("plain")
    mean, variance = (
        np.array([numbers(copy) for copy in getattr(plain, name).value.values])
        for name in ("moving_mean", "moving_variance")
    )
    sigma = np.sqrt(variance.astype("float64") + 1e-3)
    spread = np.maximum(np.ptp(mean, axis=0), np.ptp(sigma, axis=0)) / sigma.min(axis=0)
    np.testing.assert_allclose(history["sync/plain/spread"], [spread.max()], rtol=1e-4)
    assert history["sync/ours/spread"] == history["sync/theirs/spread"] == [0.0]
    layers = {one.path: one for one in monitor.report().layers}
    assert [layers[name].synchronized for name in ("ours", "plain")] == [True, False]
    assert "and is not done; moving statistics differ on the replicas by" in str(layers["plain"])


def test_tensorboard_reads_what_was_written(run):
    _, _, history, _, _, folder = run
    (file,) = folder.iterdir()
    events = list(tf.compat.v1.train.summary_iterator(str(file)))
    assert events[0].file_version == "brain.Event:2"
    values = {
        (event.step, value.tag): value.simple_value
        for event in events[1:]
        for value in event.summary.value
    }
    # The last step of the epoch is read at its end too.
    assert [event.step for event in events[1:]] == [1, 2, 2]
    for tag, (last,) in history.items():
        if tag.startswith("sync/"):
            np.testing.assert_allclose(values[2, tag], last, rtol=1e-6)


def test_the_spread_stops_training_where_that_was_asked_for():
    x, y = make_data()
    with mirrored_strategy(REPLICAS).scope():
        layers = [keras.layers.Flatten(), keras.layers.BatchNormalization(name="plain")]
        model = keras.Sequential([keras.Input(x.shape[1:]), *layers, keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=False)
    monitor = SyncMonitor(on_spread="raise")
    with pytest.raises(NotSynchronizableError, match="layer plain: replica 1 of 2"):
        model.fit(x, y, verbose=0, callbacks=[monitor])
    assert not hasattr(model.train_function, "syncbn_plain")


def test_a_nan_is_told_with_its_replica_also_between_readings():
    x, y = make_data()
    x[-1, 2, 3] = np.nan
    _, _, said = fit(SyncMonitor(interval=100), x, y)
    (nan,) = (one for one in said if "NaN" in one)
    assert "at training step 2 (step 2 of epoch 1), in the statistics of layer" in nan
    assert "number 1 of 5 calls in the order of the step, on replica 1 of 2." in nan


@pytest.mark.frameworks
def test_an_offset_of_ten_thousand_leaves_the_distances_what_they_are():
    x, y = make_data(offset=1e4)
    _, history, _ = fit(SyncMonitor(interval=1), x, y)
    for name in ("plain", "theirs"):
        assert_logged(history, name, expected(parts_of(np.split(x[ROWS:], 2))), 2e-3)


def test_under_a_strategy_whose_replicas_do_not_train_in_step_it_is_refused():
    strategy = tf.distribute.experimental.CentralStorageStrategy()
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    monitor = SyncMonitor()
    monitor.set_model(model)
    with pytest.raises(NotSynchronizableError, match="Received: CentralStorageStrategy"):
        monitor.on_train_begin()
