"""Batch renormalization: what brings a batch's normalization to that of the moving statistics.

    y = (x̂ · r + d) · gamma + beta,   r = σ_batch / σ,   d = (mean_batch − mean) / σ

where r and d are clipped and constants for the gradient, and mean and σ are moving statistics of
their own, faster ones than those of inference.

References:
    Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
    Models", arXiv:1702.03275, 2017.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from syncbn.errors import InputError
from syncbn.moments import Moments

__all__ = ["Clipping", "corrections"]


@dataclass(frozen=True)
class Clipping:
    """`r` is clipped to [rmin, rmax] and `d` to [−dmax, dmax]; None leaves a side open.

    Not a named tuple: Keras 3.0 copies one that a layer holds, all its values into the first field.
    """

    rmax: float | None = None
    rmin: float | None = None
    dmax: float | None = None

    @classmethod
    def of(cls, clipping: Mapping[str, float] | None) -> Clipping:
        """From the layer's argument `renorm_clipping`.

        Raises:
            InputError: an unknown key, something that is no number, an empty range.
        """
        names = sorted(field.name for field in fields(cls))
        if not isinstance(clipping, Mapping | None):
            raise InputError(
                f"renorm_clipping requires a dictionary with keys of {names}. "
                f"Received: renorm_clipping={clipping!r}. Give for example {{'rmax': 3.0}}."
            )
        given = dict(clipping or {})
        unknown = sorted(map(str, set(given) - set(names)))
        if unknown:
            raise InputError(
                f"renorm_clipping requires keys of {names}. Received: {unknown} in "
                f"renorm_clipping={given!r}. Remove or rename them."
            )
        wrong = {name: limit for name, limit in given.items() if not _is_limit(limit)}
        if wrong:
            raise InputError(
                f"renorm_clipping requires numbers or None. Received: {wrong!r}. Leave a key out "
                "for no limit."
            )
        limits = cls(**given)
        if limits.rmin is not None and limits.rmax is not None and limits.rmax < limits.rmin:
            raise InputError(
                "renorm_clipping requires rmin <= rmax. Received: "
                f"rmin={limits.rmin}, rmax={limits.rmax}. Exchange them."
            )
        for name in ("rmax", "dmax"):
            limit = getattr(limits, name)
            if limit is not None and limit < 0:
                raise InputError(
                    f"renorm_clipping requires {name} >= 0. Received: {name}={limit}. "
                    "r is a ratio of deviations, and d is clipped to [-dmax, dmax]."
                )
        return limits


def _is_limit(value: Any) -> bool:
    return value is None or (isinstance(value, numbers.Real) and not math.isnan(value))


def corrections(
    moments: Moments, mean: Any, deviation: Any, epsilon: float, clipping: Clipping, xp: Any
) -> tuple[Any, Any]:
    """`(r, d)`, each of shape (C,), for a batch of these moments.

    Args:
        moments: of the batch.
        mean: renormalization's moving mean, shape (C,).
        deviation: its moving standard deviation, shape (C,); √epsilon at least is taken.
        epsilon: added to the variance.
        clipping: limits of the two.
        xp: an array namespace with `maximum`, `minimum` and `sqrt`.
    """
    deviation = xp.maximum(deviation, math.sqrt(epsilon))
    r = xp.sqrt(moments.variance(xp) + epsilon) / deviation
    d = (moments.mean - mean) / deviation
    if clipping.rmin is not None:
        r = xp.maximum(r, clipping.rmin)
    if clipping.rmax is not None:
        r = xp.minimum(r, clipping.rmax)
    if clipping.dmax is not None:
        d = xp.minimum(xp.maximum(d, -clipping.dmax), clipping.dmax)
    return r, d
