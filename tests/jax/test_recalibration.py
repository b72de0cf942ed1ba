"""`recalibrate` under `keras.distribution`: what one device gives."""

import jax
import numpy as np
import pytest
from tests.harness import numbers
from tests.recalibration import assert_population, data, expected, held, in_float64, make_model
from tests.replicas.jax import distributed

import syncbn
from syncbn._backends.jax import collectives
from syncbn.recalibration import recalibrate


def recalibrated(context, source, dtype="float64"):
    with distributed(context, 4):
        model = make_model(dtype=dtype)
        recalibrate(model, source())
        copies = [
            {np.asarray(shard.data).tobytes() for shard in variable.value.addressable_shards}
            for variable in model.non_trainable_variables
            if variable.value.sharding.is_fully_replicated
        ]
        assert copies
        assert all(len(bits) == 1 for bits in copies)
    return model


def as_generator():
    return ((x,) for x in data())


# 16, 11 and 1 examples over 4 devices.
@pytest.mark.parametrize("context", ["data parallel", "model parallel"])
def test_devices_give_what_one_device_gives(context):
    with in_float64():
        assert_population(recalibrated(context, as_generator), expected(data()), 1e-11)


def test_a_distributed_data_set_and_arrays_are_taken():
    x = np.concatenate(data())
    batches = [x[:16], x[16:]]
    with in_float64(), distributed("data parallel", 4):
        for given, size in ((syncbn.distribute_dataset(x, batch_size=16), None), ((x, x), 16)):
            model = make_model()
            recalibrate(model, given, batch_size=size)
            assert_population(model, expected(batches), 1e-11)


def test_in_float32_it_is_float32_that_limits():
    assert not jax.config.jax_enable_x64
    assert_population(
        recalibrated("data parallel", as_generator, "float32"), expected(data()), 1e-5
    )


def test_devices_of_the_same_share_would_be_found(monkeypatch):
    """A mutant: each device counts the same, however many of its elements the mask leaves."""
    exchange = collectives.exchange

    def of_equals(local, replicas):
        one = local.count * 0 + 1
        return exchange(local._replace(count=one, m2=local.m2 / local.count), replicas)

    monkeypatch.setattr(collectives, "exchange", of_equals)
    batches = data((16, 8))
    model = recalibrated("data parallel", lambda: ((x,) for x in batches), "float32")
    with pytest.raises(AssertionError):
        assert_population(model, expected(batches), 1e-3)


def test_no_tracer_stays_in_the_model():
    model = make_model(dtype="float32")
    recalibrate(model, as_generator())
    assert model.losses == []
    for layer in ("first", "second"):
        assert not [name for name in vars(model.get_layer(layer)) if "gather" in name]
    assert all(np.isfinite(value).all() for pair in held(model) for value in pair)
    assert np.isfinite(numbers(model(data()[0], training=False))).all()
