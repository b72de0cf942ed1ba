"""SyncMonitor under `keras.distribution`: each device's part of the batch is a replica's."""

import warnings

import jax
import keras
import numpy as np
from tests.monitoring import assert_logged, expected
from tests.replicas.jax import distributed

import syncbn
from syncbn._backends.jax import monitoring
from syncbn.monitoring import SyncMonitor

DEVICES = 4


def make_model():
    inputs = keras.Input((3, 2))
    ours = syncbn.SyncBatchNormalization(name="ours")(keras.layers.Masking()(inputs))
    x = keras.layers.BatchNormalization(name="plain")(inputs)
    x = keras.layers.Concatenate()([ours, x])
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x)))
    model.compile("sgd", "mse")
    return model


def test_devices_see_what_numpy_sees_of_their_parts_and_a_nan_has_a_device():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3, 2)) + np.linspace(0, 3, 8)[:, None, None]
    x[2:4, 1:] = 0.0
    x = x.astype("float32")
    broken = x.copy()
    broken[5, 0, 1] = np.nan  # device 2 of four
    batches = np.concatenate([x, broken, x])
    monitor = SyncMonitor(interval=100)
    with distributed("data parallel", DEVICES), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = make_model().fit(
            batches,
            np.ones((24, 1), "float32"),
            batch_size=8,
            shuffle=False,
            verbose=0,
            callbacks=[monitor],
        )
    parts = [part.reshape(-1, 2) for part in np.split(x, DEVICES)]
    counted = [part[np.any(part != 0, axis=1)] for part in parts]
    assert_logged(history.history, "plain", expected(parts))
    assert_logged(history.history, "ours", expected(counted))
    (said,) = (str(one.message) for one in caught if "SyncMonitor" in str(one.message))
    assert "first appears at training step 2" in said
    assert "from the batch, which holds it on replica 2 of 4" in said
    layers = monitor.report().layers
    assert [one.nan_replicas for one in layers] == [(2,), (2,)]
    assert all(one.synchronized and one.spread == 0 for one in layers)


def test_rows_that_do_not_divide_lie_as_xla_lays_them():
    x = np.random.default_rng(0).normal(size=(6, 5, 2)).astype("float32")
    weights = np.random.default_rng(1).random((6, 5, 1)).astype("float32")
    moments = jax.jit(monitoring._by_parts, static_argnums=(1, 3))(x, 2, weights, 4)
    for part, rows in enumerate([slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 6)]):
        w, own = weights[rows].reshape(-1, 1), x[rows].reshape(-1, 2).astype("float64")
        mean = (w * own).sum(0) / max(w.sum(), 1e-30)
        np.testing.assert_allclose(moments.count[part], w.sum(), rtol=1e-6)
        np.testing.assert_allclose(moments.mean[part], mean, atol=1e-6)
        np.testing.assert_allclose(moments.m2[part], (w * (own - mean) ** 2).sum(0), rtol=1e-5)
