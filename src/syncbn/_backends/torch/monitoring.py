"""What the processes see in training, kept where it is until it is read.

The step is Keras's own, run with layers that tell of the moments that they take anyway. What is
added are a few operations on vectors of the size of the channels, however many layers there are; no
collective, and no waiting for the device, until a step is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from syncbn._backends.interface import Reading
from syncbn._backends.torch import collectives
from syncbn.errors import InputError, WorkerError
from syncbn.moments import Moments

__all__ = ["Watch"]


class _Told(NamedTuple):
    """What one call of a layer told."""

    layer: int
    count: Any  # a number, or a tensor of shape () or (C,)
    mean: Any
    m2: Any
    as_variance: bool  # m2 is the variance


class Watch:
    """Keeps what the layers of a model tell in each step.

    Args:
        model: compiled and built.
        layers: those that are watched.
        interval: of the steps that are read; the first is.
        switch: makes a block in which the layers tell this watch.
        told: called with each reading, in every process alike.

    Raises:
        InputError: the processes watch other layers, or at other steps.
        WorkerError: a process does not come.
    """

    # Whether Keras's own layer, as it is by default, normalizes by the global batch.
    plain_is_global = False

    def __init__(
        self,
        model: Any,
        layers: Sequence[Any],
        interval: int,
        switch: Callable[[Watch], Callable[[], Any]],
        told: Callable[[Reading], None],
    ) -> None:
        self._processes = collectives.replicas_of_model(model)
        self.replicas = self._processes.size
        self.writes = self._processes.own == 0
        self.step = 0
        self._model, self._layers, self._interval, self._on_reading = model, layers, interval, told
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}
        self._telling = switch(self)
        self._told: list[_Told] = []
        self._first: Any = None  # shape (calls,), on the device
        self._ids: dict[tuple[Any, ...], Any] = {}
        self._plain: Any = None
        self._monitored: Any = None
        self._agree([layer.name for layer in layers])

    def _agree(self, names: list[str]) -> None:
        """Make sure that all processes watch alike, before one waits for the others."""
        if self.replicas == 1:
            return
        told: list[Any] = [None] * self.replicas
        own = (len(names), [layer.moving_mean.shape[0] for layer in self._layers], self._interval)
        try:
            dist.all_gather_object(told, own, group=self._processes.group)
        except RuntimeError as error:
            raise WorkerError(
                f"SyncMonitor requires all {self.replicas} processes of the group to use it alike. "
                f"Received in process {self._processes.own}, from torch.distributed: {error} Give "
                "the callback to fit in every process; how long to wait is `timeout=` of "
                "init_process_group."
            ) from error
        for process, other in enumerate(told):
            if other != own:
                raise InputError(
                    "SyncMonitor requires the same layers and the same interval in every process. "
                    f"Received: {own[0]} layers, interval={own[2]} in process "
                    f"{self._processes.own}, and {other[0]} layers, interval={other[2]} in process "
                    f"{process}. Make model and callback alike."
                )

    def attach(self) -> None:
        """Have the model train by the step that tells."""
        now = self._model.train_function
        # Of a fit that has failed, or of another monitor, it is left there.
        self._plain = getattr(now, "syncbn_plain", now)
        self._monitored = functools.partial(self._run, self._plain)
        self._monitored.syncbn_plain = self._plain
        self._model.train_function = self._monitored

    def is_attached(self) -> bool:
        """Whether the model trains by it."""
        return self._model.train_function is self._monitored

    def detach(self) -> None:
        """The model's own step again."""
        if self.is_attached():
            self._model.train_function = self._plain

    def _run(self, plain: Callable[[Any], Any], data: Any) -> Any:
        self._told = []
        with self._telling():
            outputs = plain(data)
        self.step += 1
        with torch.no_grad():
            self._look()
        if (self.step - 1) % self._interval == 0:
            self.read()
        return outputs

    def saw_moments(self, layer: Any, moments: Moments) -> None:
        """The moments of this process's part, by a SyncBatchNormalization."""
        self._told.append(_Told(self._numbers[id(layer)], *moments, as_variance=False))

    def saw_inputs(
        self, layer: Any, inputs: Any, axis: int, weights: Any, normalizing: Any
    ) -> None:
        """What Keras's BatchNormalization normalizes, and by what; it is local on torch."""
        if normalizing is None:
            return
        mean, variance = (value.detach() for value in normalizing)
        count = _count(inputs, axis, weights)
        number = self._numbers[id(layer)]
        self._told.append(_Told(number, count, mean, variance, as_variance=True))

    def _look(self) -> None:
        """Note where NaN or infinity are new."""
        if not self._told:
            return
        values = [value for one in self._told for value in (one.mean, one.m2)]
        dtypes = sorted({value.dtype for value in values}, key=str)
        parts = [
            [(call // 2, value) for call, value in enumerate(values) if value.dtype == dtype]
            for dtype in dtypes
        ]
        finite = [torch.isfinite(torch.cat([value for _, value in part])) for part in parts]
        ids = tuple((call, value.shape[0]) for part in parts for call, value in part)
        device = values[0].device
        if (ids, device) not in self._ids:
            calls = np.repeat([call for call, _ in ids], [size for _, size in ids])
            self._ids[ids, device] = torch.as_tensor(calls, device=device)
        bad = torch.zeros(len(self._told), dtype=torch.int32, device=device)
        bad.index_add_(0, self._ids[ids, device], (~torch.cat(finite)).to(torch.int32))
        if self._first is None or self._first.shape != bad.shape:
            self._first = torch.zeros_like(bad)
        self._first = torch.where((self._first == 0) & (bad > 0), self.step, self._first)

    def read(self) -> None:
        """Tell what the last step saw, in all processes; each comes here alike."""
        if not self._told and not self.step:
            return
        row = torch.cat([value.detach().flatten().to(self._dtype()) for value in self._row()])
        rows = collectives.rows_of_replicas(row, self._processes).cpu().numpy()
        self._on_reading(self._reading(rows.astype(np.float64)))

    def _dtype(self) -> Any:
        return collectives.moments_dtype(self._layers[0].moving_mean.value.device)

    def _row(self) -> list[Any]:
        """What one row is made of: moving statistics, and of each call count, mean, M2, step."""
        row = [layer.moving_mean.value for layer in self._layers]
        row += [layer.moving_variance.value for layer in self._layers]
        if not self._told:
            return row
        assert self._first is not None
        counts = [
            torch.zeros_like(one.mean) + torch.as_tensor(one.count).to(one.mean)
            for one in self._told
        ]
        row += counts
        row += [one.mean for one in self._told]
        row += [
            one.m2 * count if one.as_variance else one.m2
            for one, count in zip(self._told, counts, strict=True)
        ]
        return [*row, self._first]

    def _reading(self, rows: Any) -> Reading:
        moving = sum(layer.moving_mean.shape[0] for layer in self._layers)
        channels = sum(one.mean.shape[0] for one in self._told)
        ends = np.cumsum([moving, moving, channels, channels, channels])
        mean, variance, count, means, m2, first = np.split(rows, ends, axis=1)
        calls = tuple(one.layer for one in self._told)
        return Reading(
            self.step, calls, count, means, m2, mean, variance, np.rint(first).astype(np.int64)
        )


def _count(inputs: Any, axis: int, weights: Any) -> Any:
    """Elements of a channel: a number, or one a channel where they are weighted."""
    axis %= inputs.dim()
    if weights is None:
        return inputs.numel() // max(inputs.shape[axis], 1)
    others = [other for other in range(inputs.dim()) if other != axis]
    return weights.detach().expand(inputs.shape).sum(dim=others)
