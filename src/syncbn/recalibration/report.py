"""What a recalibration did, as data."""

from __future__ import annotations

from typing import Any, NamedTuple

from syncbn.recalibration.layers import NotRecalibrated

__all__ = ["RecalibratedLayer", "RecalibrationReport"]


class RecalibratedLayer(NamedTuple):
    """A layer whose moving statistics are those of the data now."""

    path: str  # names from the model's layers down to it, by slashes
    layer_class: str
    elements: float | tuple[float, ...]  # of a channel; of each where a mask tells them apart


class RecalibrationReport(NamedTuple):
    """What `recalibrate` did with a model. `str()` gives it in one line."""

    model: str  # its name
    steps: int  # global batches
    layers: tuple[RecalibratedLayer, ...]
    left: tuple[NotRecalibrated, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report in numbers, strings, lists and dictionaries, as for JSON."""
        return {
            "model": self.model,
            "steps": self.steps,
            "layers": [
                one._asdict()
                | {
                    "elements": list(one.elements)
                    if isinstance(one.elements, tuple)
                    else one.elements
                }
                for one in self.layers
            ],
            "left": [one._asdict() for one in self.left],
        }

    def __str__(self) -> str:
        said = (
            f"{self.model}: {len(self.layers)} layer{_s(len(self.layers))} recalibrated on "
            f"{self.steps} batch{'es' if self.steps != 1 else ''}"
        )
        if self.left:
            first = self.left[0]
            said += f"; {len(self.left)} left as they are, as {first.path} ({first.reason})"
        return f"{said}."


def _s(number: int) -> str:
    return "" if number == 1 else "s"
