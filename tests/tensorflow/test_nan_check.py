"""`nan_check=True`: the layer, the replica and the origin, before anything is updated."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.graphs import collectives_of
from tests.harness import make_case
from tests.replicas.tensorflow import make_layer, per_replica, strategy_for

import syncbn

Stopped = tf.errors.InvalidArgumentError


def setting(replicas, **arguments):
    case = make_case([(5 + r, 3, 4) for r in range(replicas)])
    strategy = strategy_for(replicas)
    layer = make_layer(case, strategy, nan_check=True, name="norm_7", **arguments)
    return case, strategy, layer


def training_step(strategy, layer, mode):
    """An SGD step on gamma and beta, as a loop would take it."""
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(layer.trainable_variables)

    def replica(x):
        with tf.GradientTape() as tape:
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**3)
        variables = layer.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return y

    def run(x):
        return strategy.run(replica, args=(x,))

    return tf.function(run, autograph=False) if mode == "graph" else run


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize(("replicas", "bad"), [(1, [0]), (2, [1]), (4, [0, 3])])
def test_it_names_the_layer_the_replica_and_the_input_and_updates_nothing(
    replicas, bad, garbage, mode
):
    case, strategy, layer = setting(replicas)
    parts = [part.copy() for part in case.parts]
    for replica in bad:
        parts[replica][2, 1, 3] = garbage
    step = training_step(strategy, layer, mode)
    before = [weight.numpy() for weight in layer.weights]
    with pytest.raises(Stopped) as raised:
        step(per_replica(strategy, parts))
    found = "; ".join(f"replica {replica}: its input" for replica in bad)
    assert "Layer norm_7 with nan_check=True requires finite numbers" in str(raised.value)
    assert f"Received: NaN or infinity in {found}." in str(raised.value)
    assert "look at the data and the layers before" in str(raised.value)
    for own, its in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(own.numpy(), its)


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("weight", ["gamma", "beta", "moving_mean", "moving_variance"])
def test_it_tells_the_layer_s_state_from_its_input(weight, mode):
    case, strategy, layer = setting(2)
    value = getattr(layer, weight).numpy()
    value[1] = np.nan
    getattr(layer, weight).assign(value)
    with pytest.raises(Stopped) as raised:
        training_step(strategy, layer, mode)(per_replica(strategy, case.parts))
    assert "in replica 0: the state of the layer; replica 1: the state of the layer." in str(
        raised.value
    )
    assert "restore a checkpoint" in str(raised.value)


def test_both_at_once():
    case, strategy, layer = setting(1)
    layer.beta.assign(np.full(4, np.inf))
    with pytest.raises(Stopped, match="replica 0: its input and the state of the layer"):
        training_step(strategy, layer, "graph")(tf.constant(case.parts[0] * np.nan))


def test_it_is_quiet_about_what_is_masked_and_goes_on_after_an_error():
    case, strategy, layer = setting(2)
    parts = [part.copy() for part in case.parts]
    parts[1][0] = np.nan
    masks = [np.ones(part.shape[:2], bool) for part in parts]
    masks[1][0] = False
    run = tf.function(
        lambda x, m: strategy.run(lambda x, m: layer(x, training=True, mask=m), args=(x, m)),
        autograph=False,
    )
    run(per_replica(strategy, parts), per_replica(strategy, masks))
    assert np.isfinite(layer.moving_mean.numpy()).all()
    masks[1][0] = True
    with pytest.raises(Stopped, match="replica 1: its input"):
        run(per_replica(strategy, parts), per_replica(strategy, masks))
    # All replicas stopped at the same place, none is left waiting in a collective.
    run(per_replica(strategy, case.parts), per_replica(strategy, masks))


def test_without_the_argument_the_poison_spreads():
    """The control: that is what the check is for."""
    case, strategy, layer = setting(1)
    layer.nan_check = False
    training_step(strategy, layer, "graph")(tf.constant(case.parts[0] * np.nan))
    assert np.isnan(layer.gamma.numpy()).all()
    assert np.isnan(layer.moving_mean.numpy()).all()


def test_it_needs_no_collective_of_its_own():
    case, strategy, layer = setting(2)
    run = tf.function(
        lambda x: strategy.run(lambda x: layer(x, training=True), args=(x,)), autograph=False
    )
    assert len(collectives_of(run, per_replica(strategy, case.parts))) == 2


def test_xla_which_would_leave_it_out_is_refused():
    case, _, layer = setting(1)
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    with pytest.raises(syncbn.UnsupportedFeatureError, match="with jit_compile=False"):
        compiled(case.parts[0])


def test_keras_does_not_choose_xla_by_itself_for_a_model_with_the_check():
    """`compile(jit_compile="auto")` on a GPU asks every layer."""
    assert not syncbn.SyncBatchNormalization(nan_check=True).supports_jit
    assert syncbn.SyncBatchNormalization().supports_jit


def test_a_model_in_fit_stops_before_its_weights_are_poisoned():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3),
            syncbn.SyncBatchNormalization(nan_check=True, name="first"),
            keras.layers.Dense(2),
            syncbn.SyncBatchNormalization(nan_check=True, name="second"),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse", jit_compile=False)
    x = np.ones((32, 4), "f4")
    x[20] = np.nan
    with pytest.raises(Stopped, match="Layer first with"):
        model.fit(x, x[:, :1] * 0, batch_size=8, shuffle=False, verbose=0)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
