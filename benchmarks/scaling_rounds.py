"""The quartiles of what is measured, as the JSON of scaling has them."""

from __future__ import annotations

from collections.abc import Sequence

from syncbn.bench.timing import Quartiles

__all__ = ["quartiles"]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median, and the two values that half of all lie between."""
    return Quartiles.of(values)._asdict()
