"""What Keras's trainer takes its batches from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from syncbn import places
from syncbn._backends.jax import batch_axis
from syncbn._backends.jax.ragged_array import ragged_array
from syncbn.errors import InputError, NotSynchronizableError, UnsupportedFeatureError
from syncbn.ragged import structure
from syncbn.ragged.agreement import Agreement, Part

__all__ = ["RaggedAdapter"]


class RaggedAdapter(DataAdapter):  # type: ignore[misc]  # Keras has no types
    """The batches of one of Keras's adapters, of any size on any process.

    Args:
        source: Keras's adapter of this process's own data.
        agreement: what the processes agree by; None if there is only one.
    """

    def __init__(self, source: Any, agreement: Agreement | None) -> None:
        self._source, self._agreement = source, agreement
        self._passes = 0
        own = {"batches": source.num_batches, "sizes": _known_sizes(source)}
        told = [own] if agreement is None else agreement.exchange("a data set", own)
        self._batches = [one["batches"] for one in told]
        sizes = [one["sizes"] for one in told]
        # Where all sizes are known, a pass takes one exchange and not one a batch.
        self._sizes = None if None in sizes else sizes

    @property
    def num_batches(self) -> int | None:
        """Of the process that has most; None if one does not know its own."""
        if self._agreement is None:
            number: int | None = self._source.num_batches
            return number
        return None if None in self._batches else max(self._batches)

    @property
    def batch_size(self) -> int | None:
        """Of this process's own batches."""
        size: int | None = self._source.batch_size
        return size

    @property
    def has_partial_batch(self) -> bool | None:
        """Not known."""
        return None

    @property
    def partial_batch_size(self) -> int | None:
        """Not known."""
        return None

    def on_epoch_begin(self) -> None:
        """Keras's note to the source."""
        self._source.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Keras's note to the source."""
        self._source.on_epoch_end()

    def get_jax_iterator(self) -> Iterator[Any]:
        """One pass over the data: batches for `keras.distribution`, alike on all processes."""
        distribution = keras.distribution.distribution()
        if distribution is None:
            if self._agreement is not None:
                raise NotSynchronizableError(
                    "Several processes train one model only under a distribution. Received: none. "
                    "Call keras.distribution.set_distribution(keras.distribution.DataParallel("
                    "auto_shard_dataset=False)) before the model is made."
                )
            yield from self._source.get_jax_iterator()
            return
        slots = batch_axis.slots_of(
            distribution.device_mesh.backend_mesh,
            distribution.batch_dim_name,
            len(self._batches),
        )
        for batch, parts in self._agreed():
            rows = _rows_of_shards(slots, parts)
            if not sum(rows):
                continue
            where = places.place(slots, rows)
            if where.even:
                yield batch
                continue
            yield self._sent(batch, where, slots, distribution)

    def get_numpy_iterator(self) -> Iterator[Any]:
        """Not on JAX."""
        raise UnsupportedFeatureError(_not_jax())

    def get_tf_dataset(self) -> Any:
        """Not on JAX."""
        raise UnsupportedFeatureError(_not_jax())

    def get_torch_dataloader(self) -> Any:
        """Not on JAX."""
        raise UnsupportedFeatureError(_not_jax())

    def _sent(
        self, batch: Any, where: places.Places, slots: places.Slots, distribution: Any
    ) -> Any:
        """The batch as it is sent to the devices."""
        shard = slots.shard_of[0 if self._agreement is None else self._agreement.process]

        def send(array: Any) -> Any:
            layout = distribution.get_data_layout((where.rows, *array.shape[1:]))
            own_slots = len(slots.of_shard[shard])
            return ragged_array(array, where, shard, own_slots, layout.backend_layout)

        return structure.map_arrays(send, batch)

    def _agreed(self) -> Iterator[tuple[Any, list[Part]]]:
        """Batches with what every process brings to them, until nobody has any."""
        self._passes += 1
        batches = iter(self._source.get_jax_iterator())
        parts: list[Part] = []
        for step in itertools.count():
            topic = f"batch {step} of pass {self._passes} over a data set"
            batch, own = self._next(batches, topic)
            parts = self._parts(topic, step, own, parts)
            structures = [part.structure for part in parts if part.structure is not None]
            if not structures:
                return
            yield structure.empty(structures[0]) if batch is None else batch, parts

    def _next(self, batches: Iterator[Any], topic: str) -> tuple[Any, Part]:
        try:
            batch = next(batches, None)
            if batch is None:
                return None, Part(0, None)
            described = structure.described(batch, batch_axis.dtype_name)
            return batch, Part(structure.row_count(batch), described)
        except BaseException as error:
            if self._agreement is not None:
                self._agreement.fail(topic, error)
            raise

    def _parts(self, topic: str, step: int, own: Part, before: Sequence[Part]) -> list[Part]:
        if self._agreement is None:
            return [own]
        if self._sizes is None or step == 0:
            return self._agreement.parts(topic, own)
        return [
            Part(_size(sizes, step), part.structure if step < sizes[0] else None)
            for sizes, part in zip(self._sizes, before, strict=True)
        ]


def _known_sizes(source: Any) -> tuple[int, int, int] | None:
    """Number of batches, rows of one and of the last, where they cannot come otherwise: arrays."""
    if type(source).__name__ != "ArrayDataAdapter":
        return None
    return source.num_batches, source.batch_size, source.partial_batch_size or source.batch_size


def _size(sizes: Sequence[int], step: int) -> int:
    batches, rows, last = sizes
    return rows if step < batches - 1 else last if step < batches else 0


def _rows_of_shards(slots: places.Slots, parts: Sequence[Part]) -> tuple[int, ...]:
    """The rows of each shard, which are those of any of its processes."""
    rows: dict[int, int] = {}
    for process, part in enumerate(parts):
        shard = slots.shard_of[process]
        if rows.setdefault(shard, part.rows) != part.rows:
            raise InputError(
                "Processes that hold parts of one copy of the model must bring the same rows. "
                f"Received {part.rows} from process {process} where another brings {rows[shard]}."
            )
    return tuple(rows[shard] for shard in range(len(slots.of_shard)))


def _not_jax() -> str:
    return (
        "A distributed data set requires Keras on JAX. Received: a trainer of "
        f"{keras.backend.backend()!r}. Pass the data itself there."
    )
