"""`recalibrate` on the replicas of a strategy: what one device gives, on each the same bits."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.harness import numbers
from tests.recalibration import assert_population, data, expected, held, make_model, state_of
from tests.replicas.tensorflow import local_results, strategy_for

from syncbn._backends.tensorflow import collectives
from syncbn.recalibration import recalibrate


def as_dataset(batches):
    """Of tf.data, the batches of the sizes that they have."""
    specification = tf.TensorSpec((None, *batches[0].shape[1:]), tf.float32)
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=specification)


def on_replicas(replicas, make=make_model):
    with strategy_for(replicas).scope():
        return make()


# The last batch has one example: replicas without any.
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_replicas_give_what_one_device_gives_and_hold_the_same_bits(replicas):
    model, batches = on_replicas(replicas), data()
    recalibrate(model, as_dataset(batches))
    assert_population(model, expected(batches), 1e-11)
    for variable in model.non_trainable_variables:
        copies = local_results(strategy_for(replicas), variable.value)
        assert len(copies) == replicas
        assert len({copy.tobytes() for copy in copies}) == 1


@pytest.mark.parametrize("source", ["arrays", "generator", "distributed"])
def test_every_source_is_split_over_the_replicas(source):
    model, x = on_replicas(2), np.concatenate(data())
    batches = [x[:12], x[12:24], x[24:]]
    given = {
        "arrays": lambda: (x, x),
        "generator": lambda: ((batch, batch) for batch in batches),
        "distributed": lambda: strategy_for(2).experimental_distribute_dataset(as_dataset(batches)),
    }
    recalibrate(model, given[source](), batch_size=12 if source == "arrays" else None)
    assert_population(model, expected(batches), 1e-11)


def test_local_statistics_would_be_found(monkeypatch):
    monkeypatch.setattr(collectives, "sum_over_replicas", lambda vector: vector)
    model = on_replicas(2)
    recalibrate(model, as_dataset(data()))
    with pytest.raises(AssertionError):
        assert_population(model, expected(data()), 1e-2)


def test_a_nan_on_one_replica_leaves_all_as_they_were():
    batches = data()
    batches[1][-1, 0, 0] = np.nan
    model = on_replicas(2)
    before = state_of(model)
    with pytest.raises(ValueError, match="first in batch 1"):
        recalibrate(model, as_dataset(batches))
    assert state_of(model) == before


class Compiled(keras.layers.Layer):
    """A user's layer that compiles what is in it."""

    def __init__(self, inner, **arguments):
        super().__init__(**arguments)
        self.inner, self.supports_masking = inner, True
        self.compiled = tf.function(lambda x, training: self.inner(x, training=training))

    def build(self, shape):
        self.inner.build(shape)

    def call(self, inputs, training=False):
        return self.compiled(inputs, training)


@pytest.mark.parametrize("traced_before", [True, False])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_what_a_layer_compiles_itself_neither_hides_it_nor_keeps_a_trace_of_it(
    traced_before, run_eagerly
):
    def make():
        first = Compiled(keras.layers.BatchNormalization(dtype="float64"), dtype="float64")
        return make_model(masked=False, first=first)

    model, batches = make(), data()
    model.compile(run_eagerly=run_eagerly)
    x = batches[0]
    if traced_before:
        model(x, training=False)
        model.predict(x, verbose=0)
    recalibrate(model, as_dataset(batches))
    assert_population(model, expected(batches, masked=False), 1e-11)
    found, (mean, variance) = numbers(model.layers[1](model.layers[0](x))), held(model)[0]
    wanted = (numbers(model.layers[0](x)) - mean) / np.sqrt(variance + 1e-3)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
    moved = numbers(model.layers[1].inner.moving_mean)
    np.testing.assert_array_equal(moved, mean)
    assert model.predict(x, verbose=0).shape == (len(x), 6, 2)
