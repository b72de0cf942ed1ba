"""What a monitor has found, as data and in words."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from syncbn.monitoring.watched import NotWatched

__all__ = ["LayerReport", "MonitorReport", "effect_in_words"]

# Of a standard deviation of the layer's output. With n independent elements a replica's mean lies
# 1/√n from the truth by chance: 0.05 is a batch of 400 elements a channel, 0.2 one of 25.
_HARDLY, _MUCH = 0.05, 0.2


class LayerReport(NamedTuple):
    """A layer over all readings."""

    path: str  # names from the model's layers down to it, by slashes
    layer_class: str
    synchronized: bool  # whether it normalizes by the global batch
    readings: int  # steps in which all replicas looked
    # Averages over the readings; NaN without any. See docs/how-to/monitor.md for the formulas.
    mean_distance: float  # d of the replica that is farthest, in standard deviations
    mean_distance_average: float  # d, over the replicas
    variance_distance: float  # v of the replica that is farthest: a logarithm
    variance_distance_average: float  # v, over the replicas
    spread: float  # s of the moving statistics at the last reading
    nan_step: int  # the first training step that showed NaN or infinity; 0 for none
    nan_replicas: tuple[int, ...]  # that showed it in that step; none where it cannot be told

    @property
    def effect(self) -> float:
        """What normalizing by a replica's own statistics would do to its outputs, in their σ."""
        return max(self.mean_distance, self.variance_distance / 2)

    def __str__(self) -> str:
        if math.isnan(self.mean_distance):
            return f"{self.path}: nothing finite was seen of its replicas' statistics{self.rest()}"
        return (
            f"{self.path}: replicas' means lie up to {self.mean_distance:.2g} standard deviations "
            f"from the global mean, their variances up to {self._percent()} from the global "
            f"variance; {effect_in_words(self.effect, self.synchronized)}{self.rest()}"
        )

    def _percent(self) -> str:
        return f"{100 * math.expm1(min(self.variance_distance, 700.0)):.2g} %"

    def rest(self) -> str:
        """What else is to be said of it, behind its name or its distances."""
        said = ""
        if self.spread > 0:
            said += f"; moving statistics differ on the replicas by {self.spread:.2g} σ"
        if self.nan_step:
            said += f"; NaN or infinity from step {self.nan_step}"
            if self.nan_replicas:
                several = "s" if len(self.nan_replicas) > 1 else ""
                said += f" on replica{several} {', '.join(map(str, self.nan_replicas))}"
        return f"{said}."


def effect_in_words(effect: float, synchronized: bool) -> str:
    """Whether synchronizing matters, by the effect of not doing so."""
    if effect < _HARDLY:
        return "synchronizing hardly matters here"
    much = " much" if effect >= _MUCH else ""
    return f"synchronizing matters{much} here" + ("" if synchronized else ", and is not done")


class MonitorReport(NamedTuple):
    """What a `SyncMonitor` has found so far. `str()` gives it in words, a line a layer."""

    model: str  # its name
    replicas: int
    steps: int  # training steps watched
    layers: tuple[LayerReport, ...]
    left: tuple[NotWatched, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report in numbers, strings, lists and dictionaries, as for JSON."""
        return {
            "model": self.model,
            "replicas": self.replicas,
            "steps": self.steps,
            "layers": [
                one._asdict() | {"nan_replicas": list(one.nan_replicas)} for one in self.layers
            ],
            "left": [one._asdict() for one in self.left],
        }

    def __str__(self) -> str:
        replicas = f"{self.replicas} replica{'' if self.replicas == 1 else 's'}"
        lines = [f"{self.model}: {self.steps} steps on {replicas}."]
        if self.replicas == 1:
            lines[0] += " There is nothing to synchronize."
            lines += [f"{one.path}{one.rest()}" for one in self.layers if one.nan_step]
        else:
            lines += map(str, self.layers)
        lines += [f"{one.path} is not watched: {one.reason}." for one in self.left]
        return "\n".join(lines)
