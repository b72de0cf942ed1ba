"""SyncMonitor in the processes of a group, each with its own part of the data."""

import warnings

import keras
import numpy as np
from tests.monitoring import assert_logged, expected
from tests.replicas.torch import POOL

import syncbn
from syncbn.errors import InputError
from syncbn.monitoring import SyncMonitor


def on_rank(x, interval, folder):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 3))
    ours = syncbn.SyncBatchNormalization(name="ours")(inputs)
    plain = keras.layers.BatchNormalization(name="plain")(inputs)
    x_ = keras.layers.Concatenate()([ours, plain])
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x_)))
    model.compile("sgd", "mse")
    syncbn.average_gradients(model)
    monitor = SyncMonitor(folder, interval=interval)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            history = model.fit(
                x, np.ones((len(x), 1)), batch_size=6, shuffle=False, verbose=0, callbacks=[monitor]
            )
        except InputError as error:
            return str(error)
    said = [str(one.message) for one in caught if "SyncMonitor" in str(one.message)]
    return {k: v for k, v in history.history.items() if "sync" in k}, said, monitor.report()


def test_processes_log_the_same_which_is_what_numpy_gives_and_one_writes(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(rows, 4, 3)).astype("float32") + rows for rows in (6, 5)]
    (first, said, report), (second, other, _) = POOL.run(
        on_rank, [(part, 1, str(tmp_path)) for part in parts]
    )
    assert first == second
    assert said == other
    for layer in ("ours", "plain"):
        assert_logged(first, layer, expected([part.reshape(-1, 3) for part in parts]))
    (alarm,) = said
    assert "layer plain: replica 1 of 2 from replica 0, by" in alarm
    assert report.replicas == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_a_nan_has_a_process():
    parts = [np.ones((6, 4, 3), "float32"), np.ones((5, 4, 3), "float32")]
    parts[1][0, 0, 0] = np.nan
    (_, said, _), _ = POOL.run(on_rank, [(part, 1, None) for part in parts])
    (nan,) = (one for one in said if "NaN" in one)
    assert "at training step 1" in nan
    assert "on replica 1 of 2" in nan


def test_processes_that_watch_unlike_are_told_so():
    x = np.ones((6, 4, 3), "float32")
    first, second = POOL.run(on_rank, [(x, 1, None), (x, 7, None)])
    assert "the same layers and the same interval in every process" in first
    assert "interval=1 in process 0, and 2 layers, interval=7 in process 1" in first
    assert "interval=7 in process 1, and 2 layers, interval=1 in process 0" in second
