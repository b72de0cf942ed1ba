"""Batches that do not divide over the devices of one process."""

import re

import jax
import keras
import numpy as np
import pytest
from tests import ragged_training
from tests.ragged_training import ROWS, as_dataset, assert_equal, data, make_model, train

import syncbn
from syncbn import places
from syncbn._backends.jax import ragged_array

BATCH = 32  # 65 rows are 32, 32 and 1


@pytest.fixture
def four_devices():
    devices = keras.distribution.list_devices("cpu")[:4]
    return keras.distribution.DataParallel(devices=devices)


def batches():
    x, y = data()
    return [(x[at : at + BATCH], y[at : at + BATCH]) for at in range(0, ROWS, BATCH)]


@pytest.fixture(scope="module")
def expected():
    return train(make_model(), as_dataset(batches()))


def test_a_ragged_batch_is_refused_by_keras_itself(four_devices):
    with four_devices.scope(), pytest.raises(ValueError, match="partitioned 4 times"):
        train(make_model(), as_dataset(batches()))


def as_arrays():
    return syncbn.distribute_dataset(*data(), batch_size=BATCH)


def as_generator():
    return syncbn.distribute_dataset(batch for _ in range(2) for batch in batches())


def as_data_loader():
    torch = pytest.importorskip("torch")
    rows = torch.utils.data.TensorDataset(*map(torch.tensor, data()))
    return syncbn.distribute_dataset(torch.utils.data.DataLoader(rows, batch_size=BATCH))


def as_tensorflow_dataset():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices(data())
    return syncbn.distribute_dataset(dataset.batch(BATCH))


def test_65_rows_on_4_devices_train_as_on_one(four_devices, expected):
    with four_devices.scope():
        model, dataset = make_model(), as_arrays()
        assert_equal(train(model, dataset), expected)
        predicted = model.predict(dataset, verbose=0)
    alone = make_model()
    alone.set_weights(model.get_weights())
    assert predicted.shape == (ROWS, 1)
    np.testing.assert_allclose(predicted, alone.predict(data()[0], verbose=0), atol=2e-6)


@pytest.mark.parametrize("source", [as_arrays, as_data_loader, as_tensorflow_dataset])
def test_every_source_gives_its_batches_again_and_again(source, four_devices):
    with four_devices.scope():
        dataset = source()
        for _ in range(2):
            for found, wanted in zip(dataset.get_jax_iterator(), batches(), strict=True):
                for one, other in zip(found, wanted, strict=True):
                    assert one.shape == other.shape
                    np.testing.assert_array_equal(one, other)


def test_a_generator_gives_its_batches_once(four_devices, expected):
    with four_devices.scope():
        model = make_model()
        model.fit(as_generator(), steps_per_epoch=3, epochs=2, verbose=0)
    for one, other in zip(model.get_weights(), expected.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.frameworks
def test_a_model_that_is_not_compiled_trains_the_same(four_devices):
    few = batches()[1:]
    reference = train(make_model(), as_dataset(few))
    with four_devices.scope():
        model = make_model(jit_compile=False)
        assert_equal(train(model, syncbn.distribute_dataset(as_dataset(few))), reference)


def test_weights_of_examples_keep_their_meaning(four_devices):
    """A row of weight 0 counts in statistics and in the mean, as on one device."""
    x, y = data()
    weight = (np.arange(ROWS) % 3).astype("float32")
    few = [(x[:32], y[:32], weight[:32]), (x[32:], y[32:], weight[32:])]
    reference = train(make_model(), as_dataset(few))
    with four_devices.scope():
        found = train(make_model(), syncbn.distribute_dataset(as_dataset(few)))
        assert_equal(found, reference)


def test_weights_of_classes_are_those_of_fit(four_devices):
    x, y = data()
    y = (y > 0).astype("float32")
    reference = make_model()
    reference.fit(x, y, batch_size=33, shuffle=False, class_weight={0: 0.5, 1: 3.0}, verbose=0)
    with four_devices.scope():
        model = make_model()
        weights = {0: 0.5, 1: 3.0}
        dataset = syncbn.distribute_dataset(x, y, batch_size=33, class_weight=weights)
        model.fit(dataset, verbose=0)
    for one, other in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_what_fills_the_last_rows_is_never_seen(four_devices, expected, monkeypatch):
    monkeypatch.setattr(ragged_array, "filled", lambda _, shape: np.full(shape, np.nan, "f4"))
    with four_devices.scope():
        assert_equal(train(make_model(), as_arrays()), expected)


def compiled_step(batch):
    """The program of a training step on four devices, as each of them runs it."""
    from keras.src.backend.jax.trainer import _distribute_data

    # Keras's own normalization: ours takes fewer collectives where rows divide.
    layers = [keras.layers.Dense(5), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile("sgd", "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    model._symbolic_build(data_batch=batch)
    dataset = syncbn.distribute_dataset(as_dataset([batch]))
    sent = _distribute_data(next(dataset.get_jax_iterator()))
    state = model._get_jax_state(True, True, True, True)
    return jax.jit(model.train_step).lower(state, sent).compile().as_text()


def test_a_ragged_batch_stays_distributed_and_costs_no_collective(four_devices):
    """33 rows on 4 devices: 9 rows of an activation on each, and nothing is exchanged for it."""
    x, y = data()
    with four_devices.scope():
        even, ragged = (compiled_step((x[:n], y[:n])) for n in (36, 33))
    collectives = [
        len(re.findall(r" all-\w+\(| collective-\w+\(", text)) for text in (even, ragged)
    ]
    assert "f32[9,5]" in ragged
    assert not re.search(r"f32\[(33|36),", ragged)
    assert collectives[0] == collectives[1] > 0


def test_rows_of_nested_batches_must_agree():
    dataset = syncbn.distribute_dataset(as_dataset([({"a": np.ones((3, 2))}, np.ones((2, 1)))]))
    devices = keras.distribution.list_devices("cpu")[:2]
    with (
        keras.distribution.DataParallel(devices=devices).scope(),
        pytest.raises(syncbn.InputError, match=r"same number of rows.*\(3, 2\), \(2, 1\)"),
    ):
        next(dataset.get_jax_iterator())


def test_a_timeout_is_a_number_of_seconds():
    with pytest.raises(syncbn.InputError, match="timeout must be"):
        syncbn.distribute_dataset(*data(), timeout=0)


def rows_in_place(slots, counts):
    """The rows of a batch, numbered, after they were sent and moved as the places say."""
    where = places.place(slots, counts)
    sent = np.full(slots.count * where.sent_rows, -1)
    number = 0
    for own, positions, count in zip(slots.of_shard, where.positions, counts, strict=True):
        part = np.full(len(own) * where.sent_rows, -1)
        part[positions] = np.arange(number, number + count)
        number += count
        for index, slot in enumerate(own):
            rows = slice(index * where.sent_rows, (index + 1) * where.sent_rows)
            sent[slot * where.sent_rows : (slot + 1) * where.sent_rows] = part[rows]
    placed = sent.reshape(slots.count, -1)[:, : where.slot_rows].ravel().copy()
    placed[where.targets] = sent[where.sources]
    return placed[: where.rows], where


@pytest.mark.parametrize("own", [((0,), (1,)), ((0, 1), (2, 3)), ((0, 2), (1,)), ((0, 3), (1, 2))])
def test_every_row_has_one_place_whatever_the_parts(own):
    slots = places.Slots(sum(map(len, own)), own, tuple(range(len(own))))
    for first in range(9):
        for second in range(9):
            if first + second:
                rows, where = rows_in_place(slots, (first, second))
                assert sorted(rows) == list(range(first + second))
                assert not where.even or (first + second) % slots.count == 0


def test_only_surplus_rows_move():
    slots = places.Slots(4, ((0, 1), (2, 3)), (0, 1))
    assert len(places.place(slots, (8, 7)).sources) == 0
    assert len(places.place(slots, (7, 8)).sources) == 1
    assert len(places.place(slots, (8, 0)).sources) == 4
    assert places.place(slots, (8, 8)).even
    assert not places.place(slots, (9, 7)).even


def test_processes_that_share_a_part_of_their_slots_are_refused():
    with pytest.raises(syncbn.NotSynchronizableError, match="same part of the batch axis"):
        places.slots_of_processes([{0}, {0, 1}], 2)
    assert places.slots_of_processes([{0, 1}, {2, 3}], 4).shard_of == (0, 0, 1, 1)


def test_the_cases_take_all_rows_in_turn():
    rows = [ragged_training.rows_of("8 and 7 rows", process) for process in (0, 1)]
    assert rows == [[slice(0, 8), slice(16, 24)], [slice(8, 16), slice(24, 31)]]
