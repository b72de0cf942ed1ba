"""Kinds of inputs: datasets, generators, several inputs and outputs, strings, ways of sharding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import syncbn
from tests.scenarios.models import (
    compile_model,
    dense_model,
    fit,
    normal,
    observe_model,
    set_weights,
    targets,
)
from tests.scenarios.scenario import FEW, MULTI_WORKER, scenario
from tests.scenarios.world import World


def _dataset(size: int = 65, batch: int = 32, seed: int = 0) -> Any:
    x, y = normal(size, 6, seed=seed), targets(size, seed=seed + 1)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)


def _shard(dataset: Any, policy: str) -> Any:
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = getattr(
        tf.data.experimental.AutoShardPolicy, policy
    )
    return dataset.with_options(options)


@scenario(covers=["tf.data", "order of predictions"])
def dataset(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae"])
    observed = dict(fit(model, _dataset(), validation_data=_dataset(33, 16, seed=4)))
    observed["predicted"] = model.predict(_dataset(45, 16, seed=7), verbose=0)
    return observed


@scenario(covers=["tf.data without an end"])
def repeated_dataset(world: World) -> Any:
    model = dense_model(world)
    validation = _dataset(33, 16, seed=4).repeat()
    options = {"steps_per_epoch": 3, "validation_data": validation, "validation_steps": 2}
    return fit(model, _dataset().repeat(), **options)


@scenario(covers=["a dataset that is distributed already"])
def distributed_dataset(world: World) -> Any:
    given = _dataset()
    if world.strategy:
        given = world.strategy.experimental_distribute_dataset(given)
    return fit(dense_model(world), given)


class Batches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        part = slice(32 * index, 32 * (index + 1))
        return normal(65, 6)[part], targets(65)[part]


@scenario(covers=["PyDataset"])
def py_dataset(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae"])
    observed = dict(fit(model, Batches()))
    observed["predicted"] = model.predict(Batches(), verbose=0)
    return observed


def _batches(seen: list[int], size: int) -> Iterator[Any]:
    x, y = normal(size, 6), targets(size)
    for step in range(-(-size // 32)):
        seen.append(step)
        yield x[32 * step : 32 * (step + 1)], y[32 * step : 32 * (step + 1)]


@scenario(covers=["generators lose no batch"], core=("one", "workers2x1"), repairs=["building"])
def generator(world: World) -> Any:
    """One epoch that the generator's end bounds; every batch is trained on."""
    seen: list[int] = []
    model = dense_model(world, metrics=lambda: ["mae"])
    observed = dict(fit(model, _batches(seen, 225), epochs=1))
    seen.clear()
    logs = model.evaluate(_batches(seen, 97), return_dict=True, verbose=0)
    observed |= {f"evaluated/{name}": value for name, value in logs.items()}
    observed["predicted"] = model.predict(_batches(seen, 97), verbose=0)
    return observed


@scenario(covers=["generators lose no batch", "several epochs of a generator"])
def generator_over_epochs(world: World) -> Any:
    """The batches of 2 epochs of 4 steps are 8, though the generator has just as many."""
    seen: list[int] = []
    model = dense_model(world)
    return fit(model, _batches(seen, 256), epochs=2, steps_per_epoch=4)


def _two_inputs(world: World) -> Any:
    with world.scope():
        inputs = {"a": keras.Input((6,), name="a"), "b": keras.Input((3,), name="b")}
        both = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
        hidden = syncbn.SyncBatchNormalization()(keras.layers.Dense(5)(both))
        outputs = {
            "first": keras.layers.Dense(2, name="first")(hidden),
            "second": keras.layers.Dense(1, name="second")(keras.ops.tanh(hidden)),
        }
        model = keras.Model(inputs, outputs)
        set_weights(model)
        compile_model(
            model,
            loss={"first": "mse", "second": "mae"},
            loss_weights={"first": 1.0, "second": 0.3},
            metrics=lambda: {"first": ["mae"], "second": ["mse"]},
        )
    return model


@scenario(covers=["dict inputs", "several inputs and outputs"])
def dict_inputs(world: World) -> Any:
    x = {"a": normal(65, 6), "b": normal(65, 3, seed=2)}
    y = {"first": targets(65), "second": targets(65, 1, seed=3)}
    model = _two_inputs(world)
    weights = {"first": np.abs(normal(65, seed=5)), "second": np.abs(normal(65, seed=6))}
    observed = dict(fit(model, x, y, sample_weight=weights))
    predicted = model.predict(x, batch_size=64, verbose=0)
    return observed | {f"predicted/{name}": value for name, value in predicted.items()}


@scenario(covers=["several inputs and outputs"])
def list_inputs(world: World) -> Any:
    with world.scope():
        a, b = keras.Input((6,)), keras.Input((3,))
        hidden = keras.layers.Add()([keras.layers.Dense(4)(a), keras.layers.Dense(4)(b)])
        model = keras.Model([a, b], [keras.layers.Dense(2)(hidden), keras.layers.Dense(1)(hidden)])
        set_weights(model)
        compile_model(model, loss=["mse", "mse"])
    x = [normal(65, 6), normal(65, 3, seed=2)]
    observed = dict(fit(model, x, [targets(65), targets(65, 1, seed=3)]))
    predicted = model.predict(x, batch_size=64, verbose=0)
    return observed | {f"predicted {index}": value for index, value in enumerate(predicted)}


@scenario(covers=["strings", "a lookup in the model"], repairs=["building"])
def strings(world: World) -> Any:
    words = np.array(["a", "b", "c", "d", "e"])[np.random.default_rng(0).integers(5, size=(65, 3))]
    with world.scope():
        inputs = keras.Input((3,), dtype="string")
        numbers = keras.layers.StringLookup(vocabulary=["a", "b", "c"])(inputs)
        hashed = keras.layers.Hashing(4)(inputs)
        embedded = keras.layers.Embedding(4, 3)(numbers) + keras.layers.Embedding(4, 3)(hashed)
        model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(embedded)))
        set_weights(model)
        compile_model(model)
    x = tf.constant(words)
    given = tf.data.Dataset.from_tensor_slices((x, targets(65))).batch(64)
    observed = dict(fit(model, given))
    observed["predicted"] = model.predict(given, verbose=0)
    return observed


@scenario(covers=["AutoShardPolicy.DATA"], worlds=("one", *MULTI_WORKER))
def sharded_by_data(world: World) -> Any:
    return fit(dense_model(world), _shard(_dataset(), "DATA"))


@scenario(
    covers=["AutoShardPolicy.OFF"],
    worlds=("one", *MULTI_WORKER),
    core=("one", "workers2x1"),
    repairs=["inputs"],
    witnesses=("workers2x1",),
)
def not_sharded(world: World) -> Any:
    """Each worker brings its own half of every batch: together they are the global batches."""
    x, y = normal(128, 6), targets(128)
    if world.workers > 1:
        x, y = (a.reshape(4, 2, 16, -1)[:, world.worker].reshape(64, -1) for a in (x, y))
    # The batch size is that of all workers: of such a batch each takes the first half, then the
    # second, since it has no other examples.
    given = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    return fit(dense_model(world), _shard(given, "OFF"))


def _files(world: World, count: int) -> Any:
    """Records of 48 examples a file; every worker sees them all."""
    x, y = normal(96, 6), targets(96)
    paths = [str(world.folder / f"part{index}.tfrecord") for index in range(count)]
    if world.is_chief:
        for index, path in enumerate(paths):
            with tf.io.TFRecordWriter(path) as writer:
                for row in range(index, 96, count):
                    writer.write(np.concatenate([x[row], y[row]]).tobytes())
    world.wait_for_workers("files written")

    def parse(record: Any) -> Any:
        numbers = tf.reshape(tf.io.decode_raw(record, tf.float32), [8])
        return numbers[:6], numbers[6:]

    files = tf.data.Dataset.from_tensor_slices(paths)
    return files.interleave(tf.data.TFRecordDataset, cycle_length=count).map(parse)


@scenario(covers=["AutoShardPolicy.FILE"], worlds=("one", *MULTI_WORKER))
def sharded_by_file(world: World) -> Any:
    """Files that take turns: the workers' halves are the examples of one device's batches."""
    return fit(dense_model(world), _shard(_files(world, 2).batch(32), "FILE"))


@scenario(
    covers=["a shard that leaves a worker without data"],
    worlds=("one", *MULTI_WORKER),
    error=("InputError", "file"),
    error_worlds=MULTI_WORKER,
    repairs=["inputs"],
    witnesses=("workers2x1",),
)
def fewer_files_than_workers(world: World) -> Any:
    return fit(dense_model(world), _shard(_files(world, 1).batch(32), "FILE"))


@scenario(covers=["unequal numbers of batches"], worlds=("one", *MULTI_WORKER), core=FEW)
def unequal_numbers_of_batches(world: World) -> Any:
    """Worker 0 has 3 batches, worker 1 has 2: it takes part in the third with none."""
    x, y = normal(80, 6), targets(80)
    model = dense_model(world)
    if world.workers == 1:
        rows = [*range(16), *range(48, 64), *range(16, 32), *range(64, 80), *range(32, 48)]
        given = tf.data.Dataset.from_tensor_slices((x[rows], y[rows])).batch(32)
        return fit(model, given)
    own = slice(0, 48) if world.is_chief else slice(48, 80)
    local = tf.data.Dataset.from_tensor_slices((x[own], y[own]))
    size = 16 * world.workers // world.replicas
    given = world.strategy.distribute_datasets_from_function(lambda _: local.batch(size))
    return fit(model, given)


@scenario(covers=["inputs of the strategy's own functions", "evaluate"])
def evaluated_dataset(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae"])
    logs = model.evaluate(_dataset(97), return_dict=True, verbose=0)
    return {**logs, **observe_model(model)}


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that TensorFlow takes without copying it."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


class _Views(keras.utils.PyDataset):
    """Batches that are views of its arrays."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x) // 64

    def __getitem__(self, index: int) -> Any:
        batch = slice(64 * index, 64 * (index + 1))
        return self.x[batch], self.y[batch]


@scenario(covers=["data that training writes into"], repairs=["inputs"])
def views_of_arrays(world: World) -> Any:
    x, y = _aligned(normal(256, 6)), _aligned(targets(256))
    observed = dict(fit(dense_model(world), _Views(x, y), epochs=3))
    return {**observed, "x": x, "y": y}
