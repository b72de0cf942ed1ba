"""SyncMonitor on every backend: it changes nothing, and finds NaN in the step where it appears."""

import re
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from tests.monitoring import OwnStep, Watcher, bits_of, data, model, trained

import syncbn
from syncbn.errors import InputError
from syncbn.monitoring import SyncMonitor

TORCH = keras.backend.backend() == "torch"


def with_nan():
    x, y = data()
    x[12, 1, 2] = np.nan
    return x, y


KINDS = {
    "compiled": ({}, keras.Model),
    "eager": ({"run_eagerly": True}, keras.Model),
    "an own step": ({}, OwnStep),
    "steps_per_execution": ({"steps_per_execution": 2}, keras.Model),
}


SLOW = [
    pytest.param(kind, source, id=f"{kind}-{source.__name__}")
    for kind, source in [
        *(("compiled", data), ("compiled", with_nan), ("eager", data), ("an own step", data)),
        *(() if TORCH else (("steps_per_execution", data), ("steps_per_execution", with_nan))),
    ]
]


@pytest.mark.frameworks
@pytest.mark.parametrize(("kind", "source"), SLOW)
def test_training_of_any_kind_gives_the_same_bits_with_it_as_without(kind, source):
    arguments, model_class = KINDS[kind]
    x, y = source()
    plain, watched = (model(model_class, **arguments) for _ in range(2))
    monitor = SyncMonitor(interval=2)
    without = trained(plain, x, y)
    history = trained(watched, x, y, monitor)
    assert bits_of(watched) == bits_of(plain)
    assert np.array_equal(history["loss"], without["loss"], equal_nan=True)
    # It watched: each layer that is not frozen, all of whose replicas are the only one.
    report = monitor.report()
    assert report.steps == 10
    assert {one.path for one in report.layers} == {"first", "nested/shared", "last"}
    if source is data:
        assert all(one.readings > 2 and one.mean_distance < 1e-6 for one in report.layers)
        assert not any(one.nan_step for one in report.layers)


class Run(NamedTuple):
    """A model that was trained with a monitor, and one that was trained without."""

    watched: Any
    plain: Any
    monitor: SyncMonitor
    watcher: Watcher
    history: dict[str, list[float]]
    said: list[str]
    before: tuple[list[str], list[set[str]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Eight steps, of which the first, the fourth and the seventh are read; NaN in the third."""
    x, y = data(20)
    x[12] = 2000.0  # the layer behind the first makes NaN of it
    plain, watched = model(), model()
    before = [v.path for v in watched.weights], [{*vars(one)} for one in watched._flatten_layers()]
    watcher = Watcher(str(tmp_path_factory.mktemp("watcher") / "now.weights.h5"))
    monitor = SyncMonitor(interval=3)
    trained(plain, x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = watched.fit(
            *(x, y), batch_size=5, epochs=2, shuffle=False, verbose=0, callbacks=[monitor, watcher]
        )
    said = [str(one.message) for one in caught if "SyncMonitor" in str(one.message)]
    return Run(watched, plain, monitor, watcher, fitted.history, said, before)


def test_training_gives_the_same_bits_with_it_as_without(run):
    assert bits_of(run.watched) == bits_of(run.plain)


def test_nan_is_found_in_its_step_and_by_the_layer_that_it_reaches_first(run):
    (said,) = run.said
    assert "NaN or infinity first appears at training step 3 (step 3 of epoch 1)" in said
    assert "in the statistics of layer nested/shared" in said
    found = {one.path: (one.nan_step, one.nan_replicas) for one in run.monitor.report().layers}
    # From the next step on the weights are NaN, but not what the first layer sees; its own are.
    assert found["nested/shared"] == found["last"] == (3, (0,))
    assert found["first"] == (0, ())
    assert run.history["sync/nested/shared/nan_step"] == [3.0, 3.0]
    assert run.history["sync/nan_step"] == [3.0, 3.0]
    assert "nested/shared; NaN or infinity from step 3 on replica 0." in str(run.monitor.report())


def test_one_replica_is_at_no_distance_from_itself(run):
    assert max(run.history["sync/first/mean_distance"]) < 1e-6
    assert max(run.history["sync/first/variance_distance"]) < 1e-6
    assert run.history["sync/spread"] == [0.0, 0.0]
    assert "8 steps on 1 replica. There is nothing to synchronize." in str(run.monitor.report())


def test_nothing_of_it_is_in_the_model_nor_in_what_callbacks_see_and_save(run):
    seen = {keras.layers.BatchNormalization, syncbn.SyncBatchNormalization}
    telling = {
        one for one in run.watcher.classes if issubclass(one, keras.layers.BatchNormalization)
    }
    assert telling == seen
    paths, attributes = run.before
    assert run.watcher.weights == {len(paths)}
    assert [v.path for v in run.watched.weights] == paths
    own = [{*vars(one)} for one in run.watched._flatten_layers()]
    others = [{*vars(one)} for one in run.plain._flatten_layers()]
    assert own == others != attributes
    assert not hasattr(run.watched.train_function, "syncbn_plain")
    run.plain.load_weights(run.watcher.path)


def test_frozen_layers_are_said_not_to_be_watched(run):
    report = run.monitor.report()
    (left,) = report.left
    assert (left.path, left.layer_class) == ("frozen", "BatchNormalization")
    assert "frozen is not watched: it is frozen, trainable=False" in str(report)
    assert report.as_dict()["left"][0]["path"] == "frozen"


@pytest.mark.frameworks
def test_a_second_fit_goes_on_and_a_failed_one_leaves_a_model_that_trains():
    x, y = data(10)
    made, monitor = model(), SyncMonitor()
    trained(made, x, y, monitor)
    trained(made, x, y, monitor)
    assert monitor.report().steps == 8

    class Failing(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002
            raise KeyError("a callback")

    with pytest.raises(KeyError, match="a callback"):
        trained(made, x, y, SyncMonitor(), Failing())
    again = SyncMonitor()
    trained(made, x, y, again)
    assert again.report().steps == 4
    assert not hasattr(made.train_function, "syncbn_plain")


@pytest.mark.frameworks
def test_two_in_one_fit_are_told_apart():
    x, y = data(5)
    with pytest.warns(UserWarning, match="Received: another one, of a second SyncMonitor"):
        model().fit(x, y, verbose=0, callbacks=[SyncMonitor(), SyncMonitor()])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"interval": 0}, "`interval` as a number of steps, at least 1. Received: interval=0"),
        ({"interval": True}, "Received: interval=True"),
        ({"interval": 2.5}, "Received: interval=2.5"),
        ({"log_dir": 3}, "Received: log_dir=3"),
        ({"on_spread": "stop"}, "on_spread='warn' or 'raise'. Received: on_spread='stop'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match=re.escape(said)):
        SyncMonitor(**arguments)


def test_a_model_without_a_layer_to_watch_is_refused_and_no_training_has_no_report(tmp_path):
    frozen = keras.layers.BatchNormalization(trainable=False, name="frozen")
    made = keras.Sequential([keras.Input((3,)), frozen, keras.layers.Dense(1)])
    made.compile("sgd", "mse")
    monitor = SyncMonitor(tmp_path / "logs")
    with pytest.raises(InputError, match=r"Received: .* with frozen: it is frozen"):
        made.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0, callbacks=[monitor])
    assert not (tmp_path / "logs").exists()
    with pytest.raises(InputError, match="a monitor that no `fit` has begun with"):
        monitor.report()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
