"""What rounding alone may amount to: by dtype, by depth, and by how the model amplifies it."""

from __future__ import annotations

import math

import numpy as np

from syncbn.verification.measuring import Measured
from syncbn.verification.recording import Structure
from syncbn.verification.verdict import Kind

__all__ = ["COARSE", "FACTOR", "SHORT_FACTOR", "TOO_COARSE", "Tolerances", "rounding"]

FACTOR = 8.0
# Of dtypes of less than 32 bits: a replica computes the same roundings of an example as one device,
# but where statistics that are kept in 32 bits or more tip one over; measured are 0.25 of this.
SHORT_FACTOR = 4.0
# Where rounding may amount to a tenth of the outputs, agreement says little; of a half, nothing.
COARSE = 0.1
TOO_COARSE = 0.5
_SHORT = 2.0**-10

_EXACT = frozenset({Kind.INPUT, Kind.SPREAD})


def rounding(dtype: str, has_short_products: bool = False) -> float:
    """The distance from 1 to the next number of a dtype; of products that keep fewer bits, theirs.

    Args:
        dtype: of Keras, such as "bfloat16"; integers count as float32.
        has_short_products: whether products of float32 matrices keep 10 bits (TF32).
    """
    if dtype == "bfloat16":
        return 2.0**-7
    dtype = dtype if dtype.startswith("float") and dtype != "float8" else "float32"
    if dtype == "float32" and has_short_products:
        return _SHORT
    return float(np.finfo(dtype).eps)


def _factor(epsilon: float) -> float:
    return FACTOR if epsilon <= rounding("float32") else SHORT_FACTOR


class Tolerances:
    """Of every quantity, `8 · (ε · √depth + amplified)`, relative to its largest value.

    4 in place of 8 where ε is that of a dtype of less than 32 bits. Of losses and metrics ε is
    float32's at least, in which Keras and its metrics may add them up.

    ε is one rounding of the coarsest dtype up to there, depth the number of calls of layers up to
    there (twice all of them for gradients and weights, whose rounding adds up both ways), and
    `amplified` what one device makes of weights and inputs that are each off by one rounding: the
    largest such difference of any step. It grows where a model is badly conditioned. Where nothing
    but gradients departs, also what it makes of the same examples in another order: a gradient is a
    sum over them, whose terms may cancel.

    Args:
        structure: of the model on one device.
        has_short_products: as `rounding` takes it.
    """

    def __init__(self, structure: Structure, has_short_products: bool) -> None:
        self._amplified: dict[tuple[Kind, str], float] = {}
        coarsest = rounding("float64")
        self._calls: dict[str, tuple[int, float]] = {}
        for depth, call in enumerate(structure.calls, start=1):
            coarsest = max(coarsest, rounding(call.dtype, has_short_products))
            self._calls[call.key] = depth, coarsest
        if not structure.calls:
            coarsest = rounding("float32", has_short_products)
        self._whole = max(1, len(structure.calls)), coarsest

    @property
    def epsilon(self) -> float:
        """Of the coarsest dtype of the model."""
        return self._whole[1]

    def note(self, measured: Measured) -> None:
        """Take in what one device made of other roundings."""
        key = measured.kind, measured.name
        if math.isfinite(measured.difference):
            self._amplified[key] = max(self._amplified.get(key, 0.0), measured.difference)

    def of(self, measured: Measured) -> float:
        """Of this quantity."""
        if measured.kind in _EXACT:
            return 0.0
        depth, epsilon = self._whole
        if measured.kind in {Kind.OUTPUT, Kind.STATISTIC}:
            depth, epsilon = self._calls.get(measured.layer, self._whole)
        elif measured.kind in {Kind.GRADIENT, Kind.WEIGHT}:
            depth *= 2
        elif measured.kind in {Kind.LOSS, Kind.METRIC}:
            epsilon = max(epsilon, rounding("float32"))
        amplified = self._amplified.get((measured.kind, measured.name), 0.0)
        return _factor(epsilon) * (epsilon * math.sqrt(depth) + amplified) + measured.allowance

    def of_normalization(self, dtype: str, conditioning: float) -> float:
        """Of outputs against NumPy: `8 · ε · (1 + max |mean| / √(variance + epsilon))`, or 4."""
        epsilon = max(rounding(dtype), rounding("float64"))
        return _factor(epsilon) * epsilon * (1.0 + conditioning)

    def in_words(self) -> str:
        """The same for a report."""
        depth, epsilon = self._whole
        factor = f"{_factor(epsilon):.0f}"
        return (
            "Differences are relative to the largest value on one device. Rounding may amount to "
            f"{factor} · (ε · √depth + amplified), with ε = {epsilon:.1e} of the coarsest dtype, "
            f"depth = the number of calls of layers before (of {depth}; twice all of them for "
            "gradients and weights), and what one device makes of weights and inputs that are off "
            "by one rounding; where gradients alone depart also of examples in another order. "
            "Batch normalizations are compared with float64 NumPy over their own inputs too, "
            f"within {factor} · ε · (1 + |mean| / deviation). Weights may also differ "
            "by what their gradient's tolerance allows, and not at all between replicas."
        )
