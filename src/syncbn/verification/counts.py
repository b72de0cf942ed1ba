"""Whether a loss or a gradient is off by counts: of examples, of parts, of replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from syncbn.verification.aligning import Parts, difference
from syncbn.verification.measuring import Pair, gradient_scale
from syncbn.verification.verdict import Comparison

__all__ = ["agrees_reweighted", "common_ratio", "is_count", "mean_of_means", "reweighted"]


def mean_of_means(said: str, parts: Parts) -> str:
    """The evidence that parts of different sizes have equal weights."""
    sizes = ", ".join(map(str, parts.sizes))
    return (
        f"{said}. With each replica's share by its number of examples ({sizes}) they agree: it is "
        "the mean of the replicas' means."
    )


def is_count(ratio: float, parts: Parts, tolerance: float) -> bool:
    """Whether it may be one count divided by another."""
    replicas, sizes = len(parts.rows), parts.sizes
    candidates = {float(replicas), 1.0 / replicas, float(parts.size), 1.0 / parts.size}
    candidates |= {parts.size / size for size in sizes if size}
    candidates |= {size / parts.size for size in sizes if size}
    slack = max(10 * tolerance, 1e-4)
    return any(abs(ratio / one - 1) <= slack for one in candidates if one != 1.0)


def common_ratio(pair: Pair) -> float | None:
    """By what all gradients differ, if by one factor."""
    ratios = []
    for number, expected in pair.reference.gradients.get(0, {}).items():
        own = pair.total_gradient(number)
        expected = np.asarray(expected, np.float64)
        if own is None or np.abs(expected).max(initial=0.0) < gradient_scale(pair, number):
            continue
        own = np.asarray(own, np.float64)
        ratio = float(np.sum(own * expected) / np.sum(expected**2))
        if difference(own, ratio * expected) > 1e-2:
            return None
        ratios.append(ratio)
    if not ratios or max(ratios) - min(ratios) > 1e-2 * abs(max(ratios)):
        return None
    return float(np.median(ratios))


def reweighted(values: Mapping[int, Any], parts: Parts) -> Any | None:
    """Shares of equal size, made shares by the number of examples."""
    replicas = len(parts.rows)
    if len(set(parts.sizes)) == 1 or not values.keys() >= set(parts.order):
        return None
    return sum(
        np.asarray(values[replica], np.float64) * len(rows) * replicas / parts.size
        for replica, rows in parts.rows.items()
        if len(rows)
    )


def agrees_reweighted(pair: Pair, parts: Parts, failed: Sequence[Comparison]) -> bool:
    """Whether a gradient that is wrong is right once it is weighted by examples.

    Of the last layers: in front of a synchronized layer shares have been mixed.
    """
    wrong = {one.name: one for one in failed}
    for number, expected in sorted(pair.reference.gradients.get(0, {}).items(), reverse=True):
        one = wrong.get(pair.structure.trainable[number].path)
        shares = {
            replica: gradients[number]
            for replica, gradients in pair.own.gradients.items()
            if number in gradients
        }
        if one is None or not pair.sharing.summed_gradients:
            continue
        mended = reweighted(shares, parts)
        return mended is not None and difference(mended, expected) <= 10 * one.tolerance
    return False
