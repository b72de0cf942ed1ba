"""The steps of a recalibration on torch: in one process, or in step with those of a group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import torch
import torch.distributed as dist
from keras import ops, tree
from keras.src.trainers.epoch_iterator import EpochIterator

from syncbn._backends.torch import collectives
from syncbn.errors import WorkerError

__all__ = ["moments_dtype", "scope", "vectors"]


def scope(model: Any) -> Any:
    """The context in which variables of the model are made and assigned: any."""
    del model
    return contextlib.nullcontext()


def moments_dtype(model: Any) -> str:
    """In which the processes exchange moments."""
    device = model.variables[0].value.device
    return str(collectives.moments_dtype(device)).removeprefix("torch.")


def vectors(model: Any, data: Any, gathered: Sequence[Any], steps: int | None) -> Iterator[Any]:
    """What was gathered in each step, all variables in one vector; the same in every process.

    Args:
        model: called in inference on each batch.
        data: `x` and `batch_size`, for Keras's adapters; each process's own.
        gathered: variables, set to 0 before each step.
        steps: at most so many; None for as many as the process with most has.
    """
    processes = _Processes(collectives.replicas_of_model(model))
    with processes.told_of_errors():
        adapter = EpochIterator(x=data.x, batch_size=data.batch_size, shuffle=False).data_adapter
        adapter.on_epoch_begin()
    try:
        with processes.told_of_errors():
            batches = iter(adapter.get_torch_dataloader())
        taken = 0
        while taken != steps:
            with processes.told_of_errors():
                batch = next(batches, None)
                x = None if batch is None else keras.utils.unpack_x_y_sample_weight(batch)[0]
            x = processes.joined(x)
            if x is None:
                return
            yield _step(model, x, gathered)
            taken += 1
    finally:
        adapter.on_epoch_end()


def _step(model: Any, x: Any, gathered: Sequence[Any]) -> Any:
    with torch.no_grad():
        for variable in gathered:
            variable.value.zero_()
        model(x, training=False)
        return torch.cat([variable.value.reshape(-1) for variable in gathered]).cpu().numpy()


class _Processes:
    """What the processes tell each other before each step.

    So that one that has run out, or failed, is known before the collective that would wait for it.
    """

    def __init__(self, replicas: collectives.Replicas) -> None:
        self._replicas = replicas

    @contextlib.contextmanager
    def told_of_errors(self) -> Iterator[None]:
        """What is raised in the block, the other processes hear."""
        try:
            yield
        except BaseException as error:
            if self._replicas.size > 1:
                # The error itself counts, not that the others may be gone too.
                with contextlib.suppress(WorkerError):
                    self._tell({"error": f"{type(error).__name__}: {error}"})
            raise

    def joined(self, x: Any) -> Any:
        """This process's part of the next step, without rows where it has run out; None at the end.

        Raises:
            WorkerError: another process failed, is gone, or late.
        """
        if self._replicas.size == 1:
            return x
        empty = None if x is None else tree.map_structure(_without_rows, x)
        told = self._tell({"empty": empty})
        failed = [(rank, one["error"]) for rank, one in enumerate(told) if "error" in one]
        if failed:
            rank, error = failed[0]
            raise WorkerError(
                "Recalibration requires the data of every process. Received: process "
                f"{rank} failed while it made its own: {error} The moving statistics are what "
                "they were."
            )
        empties = [one["empty"] for one in told if one["empty"] is not None]
        if not empties:
            return None
        return empties[0] if x is None else x

    def _tell(self, message: Any) -> list[Any]:
        told: list[Any] = [None] * self._replicas.size
        try:
            dist.all_gather_object(told, message, group=self._replicas.group)
        except RuntimeError as error:
            raise WorkerError(
                f"Recalibration requires all {self._replicas.size} processes of the group to call "
                f"it alike. Received in process {self._replicas.own}, from torch.distributed: "
                f"{error} See what the others printed last. How long to wait is `timeout=` of "
                "init_process_group. The moving statistics are what they were."
            ) from error
        return told


def _without_rows(array: Any) -> Any:
    return ops.convert_to_numpy(array)[:0]
