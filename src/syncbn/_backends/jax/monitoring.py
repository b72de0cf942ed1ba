"""What the devices of a distribution see in training, by a look at the batch before the step.

The step is left as it is: XLA might round one that tells something otherwise. At a step that is to
be read, the same step is compiled a second time, with layers that tell, as a function that returns
nothing else; XLA leaves out of it all but the forward pass up to the last of these layers. It is
given the state and the batch that the step then takes, and changes neither.

After each step a small function looks for NaN in the moving statistics and in the batch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from syncbn._backends.interface import Reading
from syncbn._backends.jax import collectives
from syncbn.errors import InputError
from syncbn.moments import Moments, merge

__all__ = ["Watch"]


class Watch:
    """Looks at what the layers of a model see.

    Args:
        model: compiled and built.
        layers: those that are watched.
        interval: of the steps that are read; the first is.
        switch: makes a block in which the layers tell this watch.
        told: called with each reading.
    """

    # Whether Keras's own layer, as it is by default, normalizes by the global batch.
    plain_is_global = True

    def __init__(
        self,
        model: Any,
        layers: Sequence[Any],
        interval: int,
        switch: Callable[[Watch], Callable[[], Any]],
        told: Callable[[Reading], None],
    ) -> None:
        self._mesh, self._axis, self.replicas = _parts_of_batch()
        self.writes = jax.process_index() == 0
        self.step = 0
        self._model, self._layers, self._interval, self._told = model, layers, interval, told
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}
        self._telling = switch(self)
        # As Keras's variables, the only things that leave a step of any making.
        self._published = [_published(self.replicas, layer) for layer in layers]
        self._order: list[int] = []  # layers by their first call
        self._looked: Any = None
        self._first = np.zeros(len(layers), np.int32)
        self._first_of_batch = np.zeros(self.replicas, np.int32)
        self._moving: list[Any] = []
        self._plain: Any = None
        self._monitored: Any = None
        self._probe: Any = None
        self._check: Any = None

    def attach(self) -> None:
        """Have the model look before the steps that are read."""
        now = self._model.train_function
        # Of a fit that has failed, or of another monitor, it is left there.
        plain = getattr(now, "syncbn_plain", now)
        if self._monitored is None or plain is not self._plain:
            self._plain = plain
            self._monitored = functools.partial(self._run, plain)
            self._monitored.syncbn_plain = plain
            self._probe = self._compiled(self._look)
            self._check = self._compiled(functools.partial(_check, self.replicas), always=True)
        places = {id(v): place for place, v in enumerate(self._model.non_trainable_variables)}
        self._places = [
            places[id(variable)]
            for layer in self._layers
            for variable in (layer.moving_mean, layer.moving_variance)
        ]
        self._model.train_function = self._monitored

    def _compiled(self, function: Callable[..., Any], always: bool = False) -> Callable[..., Any]:
        """Under `jit` if the model's step is; what comes out is the same on all devices."""
        if not always and (self._model.run_eagerly or not self._model.jit_compile):
            return function
        if self._mesh is None:
            return jax.jit(function)  # type: ignore[no-any-return]
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return jax.jit(function, out_shardings=everywhere)  # type: ignore[no-any-return]

    def is_attached(self) -> bool:
        """Whether the model trains by it."""
        return self._model.train_function is self._monitored

    def detach(self) -> None:
        """The model's own step again."""
        if self.is_attached():
            self._model.train_function = self._plain

    def _run(self, plain: Callable[..., Any], state: Any, iterator: Any) -> Any:
        steps = int(self._model.steps_per_execution)
        due = -self.step % self._interval < steps
        batches = _Noting(iterator)
        if due:
            first = next(iterator)
            batches = _Noting(itertools.chain([first], iterator))
            self._looked = self._probe(state, first)
        logs, state = plain(state, batches)
        self.step += len(batches.taken)
        self._moving = [state[1][place] for place in self._places]
        data = [leaf for leaf in jax.tree.leaves(batches.taken) if _is_float(leaf)]
        self._first, self._first_of_batch = self._check(
            self._first, self._first_of_batch, np.int32(self.step), self._moving, data
        )
        if due:
            self.read()
        return logs, state

    def _look(self, state: Any, data: Any) -> Any:
        """What the layers tell in the step that begins with the state; nothing else of it."""
        trainable, others, *rest = state
        self._order = []
        with self._publishing() as places:
            widened = list(others)
            for place, variable in places:
                widened.insert(place, jnp.zeros(variable.shape, variable.dtype))
            _, after = self._model.train_step((trainable, widened, *rest), data)
        return [after[1][place] for place, _ in places]

    @contextlib.contextmanager
    def _publishing(self) -> Iterator[list[tuple[int, Any]]]:
        """A block where layers tell into variables that Keras takes for theirs; where they are."""
        for layer, variable in zip(self._layers, self._published, strict=True):
            layer._non_trainable_variables.append(variable)
        try:
            ours = {id(variable) for variable in self._published}
            with self._telling():
                yield [
                    (place, variable)
                    for place, variable in enumerate(self._model.non_trainable_variables)
                    if id(variable) in ours
                ]
        finally:
            for layer in self._layers:
                layer._non_trainable_variables.pop()

    def saw_moments(self, layer: Any, moments: Moments) -> None:
        """Never: on JAX the layers tell their inputs."""

    def saw_inputs(
        self,
        layer: Any,
        inputs: Any,
        axis: int,
        weights: Any,
        normalizing: Any,
    ) -> None:
        """The whole batch, which lies on the devices in parts."""
        del normalizing
        number = self._numbers[id(layer)]
        variable = self._published[number]
        axis %= inputs.ndim
        if self.replicas > 1 and axis == 0:
            return
        own = _by_parts(jax.lax.stop_gradient(inputs), axis, weights, self.replicas)
        if number in self._order:
            before = Moments(*jnp.moveaxis(jnp.asarray(variable.value), 1, 0))
            own = merge(before, own, jnp)
        else:
            self._order.append(number)
        variable.assign(jnp.stack(own, axis=1))

    def read(self) -> None:
        """Tell what was looked at last, and what the moving statistics are now."""
        if not self._moving or self._looked is None:
            return
        order = self._order_of_places()
        tables = dict(zip(order, map(np.asarray, self._looked), strict=True))
        nothing = np.zeros((self.replicas, 3, 0))
        told = np.concatenate([nothing, *(tables[layer] for layer in self._order)], axis=2)
        copies = [_copies(array, self._mesh, self._axis, self.replicas) for array in self._moving]
        first = np.broadcast_to(np.asarray(self._first), (self.replicas, len(self._layers)))
        count, mean, m2 = np.moveaxis(told.astype(np.float64), 1, 0)
        self._told(
            Reading(
                self.step,
                tuple(self._order),
                count,
                mean,
                m2,
                np.concatenate(copies[0::2], axis=1),
                np.concatenate(copies[1::2], axis=1),
                first[:, self._order].astype(np.int64),
                np.asarray(self._first_of_batch).astype(np.int64),
            )
        )

    def _order_of_places(self) -> list[int]:
        """The layers in the order that the model has their variables in."""
        places = {id(v): place for place, v in enumerate(self._model.non_trainable_variables)}
        means = [places[id(layer.moving_mean)] for layer in self._layers]
        return [int(number) for number in np.argsort(means)]


class _Noting:
    """An iterator that notes what is taken from it."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self.taken: list[Any] = []

    def __iter__(self) -> _Noting:
        return self

    def __next__(self) -> Any:
        self.taken.append(next(self._iterator))
        return self.taken[-1]


def _published(replicas: int, layer: Any) -> Any:
    dtype = str(np.dtype(collectives.moments_dtype()).name)
    zeros = np.zeros((replicas, 3, layer.moving_mean.shape[0]))
    return keras.Variable(zeros, dtype=dtype, trainable=False)


def _parts_of_batch() -> tuple[Any, Any, int]:
    """The mesh of Keras's distribution, its axis for the batch, and over how many devices that is.

    Raises:
        InputError: a distribution without such an axis.
    """
    active = keras.distribution.distribution()
    if active is None:
        return None, None, 1
    name = getattr(active, "batch_dim_name", None)
    if name is None:
        raise InputError(
            "SyncMonitor requires a distribution that splits the batch, as "
            f"keras.distribution.DataParallel. Received: {type(active).__name__}. Train under that "
            "one, or without the monitor."
        )
    mesh = active.device_mesh.backend_mesh
    return mesh, name, int(mesh.shape[name])


def _split(array: Any, parts: int) -> Any:
    """The rows of each device, shape (R, rows, …), and which of them there are, (R, rows).

    As XLA lays them out: the last devices have less where the number does not divide.
    """
    rows = array.shape[0]
    of_part = -(-rows // parts)
    padded = jnp.pad(array, [(0, of_part * parts - rows)] + [(0, 0)] * (array.ndim - 1))
    there = (jnp.arange(of_part * parts) < rows).reshape(parts, of_part)
    return padded.reshape(parts, of_part, *array.shape[1:]), there


def _by_parts(inputs: Any, axis: int, weights: Any, parts: int) -> Moments:
    """Count, mean and M2 of the elements on each device, of shape (R, C), in two passes."""
    dtype = jnp.promote_types(inputs.dtype, jnp.float32)
    if axis == 0:  # one part, where the first axis need not be that of the examples
        inputs = jnp.moveaxis(inputs, 0, -1)
        weights = None if weights is None else jnp.moveaxis(weights, 0, -1)
        axis = inputs.ndim - 1
    x, there = _split(inputs.astype(dtype), parts)
    w = jnp.ones((1,) * inputs.ndim, dtype) if weights is None else jnp.asarray(weights, dtype)
    w = jnp.broadcast_to(w, (inputs.shape[0], *w.shape[1:]))
    w = _split(w, parts)[0] * there.reshape(*there.shape, *(1,) * (inputs.ndim - 1))
    w = jnp.broadcast_to(jax.lax.stop_gradient(w), x.shape)
    others = tuple(other for other in range(1, x.ndim) if other != axis + 1)
    x = jnp.where(w > 0, x, 0)
    count = w.sum(others)
    shape = tuple(1 if other in others else size for other, size in enumerate(x.shape))
    mean = (w * x).sum(others) / jnp.maximum(count, 1e-30)
    m2 = (w * (x - mean.reshape(shape)) ** 2).sum(others)
    out = collectives.moments_dtype()
    return Moments(count.astype(out), mean.astype(out), m2.astype(out))


def _check(
    parts: int, first: Any, first_of_batch: Any, step: Any, moving: Sequence[Any], data: Any
) -> tuple[Any, Any]:
    """The first steps with NaN or infinity, of each layer and of each device's part of batches."""
    bad = jnp.stack(
        [
            ~(jnp.isfinite(mean).all() & jnp.isfinite(variance).all())
            for mean, variance in zip(moving[0::2], moving[1::2], strict=True)
        ]
    )
    bad_data = jnp.zeros(parts, bool)
    for leaf in data:
        if leaf.ndim and leaf.shape[0]:
            split, _ = _split(leaf, parts)
            bad_data |= ~jnp.isfinite(split).reshape(parts, -1).all(axis=1)
    return (
        jnp.where((first == 0) & bad, step, first),
        jnp.where((first_of_batch == 0) & bad_data, step, first_of_batch),
    )


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _copies(array: Any, mesh: Any, axis: Any, parts: int) -> Any:
    """The copy of each place along the batch axis, shape (R, C).

    Where they are on other processes, or split, it is what JAX takes for the value.
    """
    value = np.asarray(array, np.float64)
    copies = np.repeat(value[None], parts, axis=0)
    if mesh is None or not array.sharding.is_fully_replicated:
        return copies
    along = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    of_device = {
        device: place for place, row in enumerate(along) for device in np.asarray(row).flat
    }
    for shard in array.addressable_shards:
        own = np.asarray(shard.data, np.float64)
        if not np.array_equal(own, value, equal_nan=True):
            copies[of_device[shard.device]] = own
    return copies
