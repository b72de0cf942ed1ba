"""What `load_weights` did, as data."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CheckpointWarning", "LoadReport", "Restored"]


class CheckpointWarning(UserWarning):
    """Weights were loaded, and the file leaves open, or says otherwise, how the layers were."""


class Restored(NamedTuple):
    """A layer of the model and where its weights came from."""

    layer: str
    """Its path in the model: `backbone/bn`."""
    source: str
    """Its path in the file."""
    arrays: tuple[str, ...]
    """The weights it got."""


class LoadReport(NamedTuple):
    """What was restored from where, and what else there was."""

    path: str
    format: str
    keras_version: str | None
    """The Keras that saved it, where the file says so."""
    restored: tuple[Restored, ...]
    left_out: tuple[str, ...]
    """What is in the file and was not loaded, as slots of the optimizer."""
    untouched: tuple[str, ...]
    """Layers of the model that kept their weights, with `partial=True`."""
    notes: tuple[str, ...]
    """What to know of it; the first of them were warnings."""

    def summary(self) -> str:
        """The report in a few lines."""
        arrays = sum(len(one.arrays) for one in self.restored)
        by = f" of Keras {self.keras_version}" if self.keras_version else ""
        lines = [f"{self.path} ({self.format}{by}): {len(self.restored)} layers, {arrays} arrays"]
        lines += [f"left out: {one}" for one in self.left_out]
        if self.untouched:
            lines.append(f"untouched: {', '.join(self.untouched)}")
        return "\n".join([*lines, *self.notes])
