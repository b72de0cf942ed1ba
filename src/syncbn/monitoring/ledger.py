"""What a monitor has read so far, by layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from syncbn._backends.interface import Reading
from syncbn.monitoring.report import LayerReport, MonitorReport
from syncbn.monitoring.statistics import (
    Distances,
    FirstFault,
    distances,
    first_faults,
    spread,
)
from syncbn.monitoring.watched import NotWatched, Watched

__all__ = ["Ledger", "Parted"]

_NAMES = (
    "mean_distance",
    "mean_distance_average",
    "variance_distance",
    "variance_distance_average",
)


class Parted(NamedTuple):
    """A layer whose moving statistics differ between replicas."""

    path: str
    synchronized: bool
    replicas: tuple[int, ...]  # that hold others than the first
    spread: float


class Ledger:
    """Sums and last values of all readings of a model.

    Args:
        watched: its layers.
        replicas: how many there are.
        plain_is_global: whether Keras's own layers normalize by the global batch.
    """

    def __init__(
        self, watched: Sequence[Watched], replicas: int, plain_is_global: bool = False
    ) -> None:
        self._watched, self._replicas = watched, replicas
        self._synchronized = [
            plain_is_global or bool(getattr(one.layer, "synchronized", False)) for one in watched
        ]
        self._channels = [int(one.layer.moving_mean.shape[0]) for one in watched]
        self._epsilons = [float(one.layer.epsilon) for one in watched]
        size = len(watched)
        self._last = np.full((len(Distances._fields), size), np.nan)
        self._sums = np.zeros_like(self._last)
        self._readings = np.zeros(size, int)
        self._spread = np.zeros(size)
        self._faults: list[FirstFault | None] = [None] * size
        self._said = np.zeros(size, bool)

    def add(self, reading: Reading) -> tuple[list[Parted], list[FirstFault]]:
        """Take a reading in.

        Returns:
            What is to be said once: layers that are found to have parted now, and, when NaN is
            found for the first time, every layer that has seen it.
        """
        if reading.calls:
            found = np.stack(distances(reading, self._channels, self._epsilons))
            looked = self._looked(reading)
            self._last = np.where(looked, found, self._last)
            finite = np.isfinite(found).all(axis=0)
            self._sums += np.where(finite, found, 0.0)
            self._readings += finite
        self._spread, others = spread(reading, self._channels, self._epsilons)
        parted = [
            Parted(
                self._watched[int(layer)].path,
                self._synchronized[int(layer)],
                tuple(map(int, np.flatnonzero(others[:, layer]))),
                float(self._spread[layer]),
            )
            for layer in np.flatnonzero((self._spread > 0) & ~self._said)
        ]
        self._said |= self._spread > 0
        nothing_before = not any(self._faults)
        self._faults = first_faults(reading, len(self._watched))
        faults = [fault for fault in self._faults if fault]
        return parted, sorted(faults, key=_order) if nothing_before else []

    def _looked(self, reading: Reading) -> Any:
        """Whether all replicas looked at each layer in this step."""
        looked = np.zeros(len(self._watched), bool)
        ends = np.cumsum([self._channels[layer] for layer in reading.calls])
        for layer, end in zip(reading.calls, ends, strict=True):
            looked[layer] = (reading.count[:, end - 1] >= 0).all()
        return looked

    def by_layer(self) -> dict[str, float]:
        """All values of all layers as last read, by their names in the history."""
        values: dict[str, float] = {}
        for layer, (path, _) in enumerate(self._watched):
            fault = self._faults[layer]
            values |= {
                f"sync/{path}/{name}": float(last[layer])
                for name, last in zip(_NAMES, self._last, strict=True)
            }
            values[f"sync/{path}/spread"] = float(self._spread[layer])
            values[f"sync/{path}/nan_step"] = float(fault.step if fault else 0)
        return values

    def of_model(self) -> dict[str, float]:
        """The largest of the layers as last read, and the first step with NaN."""
        steps = [fault.step for fault in self._faults if fault]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of layers that are all NaN
            mean, _, variance, _ = np.nanmax(self._last, axis=1)
        return {
            "sync/mean_distance": float(mean),
            "sync/variance_distance": float(variance),
            "sync/spread": float(self._spread.max()),
            "sync/nan_step": float(min(steps, default=0)),
        }

    def report(self, model: str, steps: int, left: Sequence[NotWatched]) -> MonitorReport:
        """All of it, as data."""
        return MonitorReport(
            model, self._replicas, steps, tuple(map(self._of, range(len(self._watched)))), (*left,)
        )

    def _of(self, layer: int) -> LayerReport:
        readings, fault = int(self._readings[layer]), self._faults[layer]
        mean, mean_average, variance, variance_average = (
            float(total) / readings if readings else math.nan for total in self._sums[:, layer]
        )
        path, watched = self._watched[layer]
        return LayerReport(
            path=path,
            layer_class=type(watched).__name__,
            synchronized=self._synchronized[layer],
            readings=readings,
            mean_distance=mean,
            mean_distance_average=mean_average,
            variance_distance=variance,
            variance_distance_average=variance_average,
            spread=float(self._spread[layer]),
            nan_step=fault.step if fault else 0,
            nan_replicas=fault.replicas if fault else (),
        )


def _order(fault: FirstFault) -> tuple[int, int]:
    return fault.step, fault.call
