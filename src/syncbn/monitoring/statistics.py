"""How far replicas are from each other, by what they saw in one step: pure NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from syncbn._backends.interface import Reading

__all__ = ["Distances", "FirstFault", "distances", "first_faults", "spread"]


class Distances(NamedTuple):
    """Of each layer, shape (L,): NaN where a replica did not look, or saw NaN."""

    mean: Any  # d, the largest over the replicas
    mean_average: Any  # d, the average over the replicas
    variance: Any  # v, the largest
    variance_average: Any  # v, the average


class FirstFault(NamedTuple):
    """Where a layer first saw NaN or infinity."""

    layer: int
    call: int
    step: int
    replicas: tuple[int, ...]  # those that saw it in this step; none where it cannot be told


def distances(reading: Reading, channels: Sequence[int], epsilons: Sequence[float]) -> Distances:
    """Of each layer, how far the statistics of the replicas are from those of the global batch.

        d_r = √(1/C · Σ_c (mean_rc − mean_c)² / (variance_c + epsilon))
        v_r = 1/C · Σ_c |log((variance_rc + epsilon) / (variance_c + epsilon))|

    where mean_c and variance_c are those of the union of all replicas' elements, by Chan's formula,
    so that each counts by its elements. A replica without elements has no distance. A layer that is
    called several times has the elements of all its calls.

    Args:
        reading: of one step.
        channels: C of each layer.
        epsilons: of each layer.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        count, mean, m2 = _by_layer(reading, channels)
        total, mean_all, m2_all = _union(count, mean, m2)
        begins = np.cumsum([0, *channels[:-1]])
        sizes = np.asarray(channels)
        epsilon = np.repeat(np.asarray(epsilons, np.float64), sizes)
        deviation = m2_all / np.maximum(total, 1e-30) + epsilon
        own = m2 / np.maximum(count, 1e-30) + epsilon

        def average(values: Any) -> Any:
            return np.add.reduceat(values, begins, axis=1) / sizes

        seen = count > 0
        d = np.sqrt(average(np.where(seen, (mean - mean_all) ** 2 / deviation, 0.0)))
        v = average(np.where(seen, np.abs(np.log(own / deviation)), 0.0))
        has_elements = np.maximum.reduceat(count, begins, axis=1) > 0
        unseen = np.minimum.reduceat(count, begins, axis=1) < 0
        d, v = (np.where(unseen.any(axis=0), np.nan, of_all) for of_all in (d, v))
        replicas = has_elements.sum(axis=0)
        return Distances(
            d.max(axis=0), d.sum(axis=0) / replicas, v.max(axis=0), v.sum(axis=0) / replicas
        )


def _by_layer(reading: Reading, channels: Sequence[int]) -> tuple[Any, Any, Any]:
    """Count, mean and M2 of each replica with the calls of a layer as one, shape (R, M)."""
    if reading.calls == tuple(range(len(channels))):
        return reading.count, reading.mean, reading.m2
    replicas = reading.count.shape[0]
    parts: list[Any] = [np.zeros((3, replicas, size)) for size in channels]
    seen: set[int] = set()
    begin = 0
    for layer in reading.calls:
        own = slice(begin, begin + channels[layer])
        one = np.stack([reading.count[:, own], reading.mean[:, own], reading.m2[:, own]])
        if layer in seen:
            both = np.stack([parts[layer], one], axis=1)
            one = np.stack(_union(*both))
        parts[layer] = one
        seen.add(layer)
        begin = own.stop
    for layer, size in enumerate(channels):
        if layer not in seen:
            parts[layer] = np.full((3, replicas, size), -1.0)
    count, mean, m2 = np.concatenate(parts, axis=2)
    return count, mean, m2


def _union(count: Any, mean: Any, m2: Any) -> tuple[Any, Any, Any]:
    """Moments of the union of the sets along the first axis; an empty one may hold anything."""
    mean, m2 = np.where(count != 0, mean, 0.0), np.where(count != 0, m2, 0.0)
    total = count.sum(axis=0)
    divisor = np.maximum(total, 1e-30)
    pivot = (count * mean).sum(axis=0) / divisor
    deviations = mean - pivot
    shift = (count * deviations).sum(axis=0) / divisor
    return total, pivot + shift, (m2 + count * (deviations - shift) ** 2).sum(axis=0)


def spread(reading: Reading, channels: Sequence[int], epsilons: Sequence[float]) -> tuple[Any, Any]:
    """How far the moving statistics of the replicas are apart, and which replica has others.

        s = max_c max(max_r moving_mean − min_r moving_mean, max_r σ − min_r σ) / min_r σ

    where `σ = √(moving_variance + epsilon)` of channel c on replica r: 0 if all hold the same bits.
    It is infinite where one replica holds NaN and another does not.

    Returns:
        s of each layer, shape (L,), and whether a replica holds other bits than the first, (R, L).
    """
    begins = np.cumsum([0, *channels[:-1]])
    epsilon = np.repeat(np.asarray(epsilons, np.float64), channels)
    mean, variance = reading.moving_mean, reading.moving_variance
    same = (mean == mean[:1]) | (np.isnan(mean) & np.isnan(mean[:1]))
    same &= (variance == variance[:1]) | (np.isnan(variance) & np.isnan(variance[:1]))
    with np.errstate(invalid="ignore", over="ignore"):
        sigma = np.sqrt(np.maximum(variance, 0) + epsilon)
        apart = np.maximum(np.ptp(mean, axis=0), np.ptp(sigma, axis=0)) / sigma.min(axis=0)
    apart = np.where(same.all(axis=0), 0.0, np.where(np.isfinite(apart), apart, np.inf))
    others = np.logical_or.reduceat(~same, begins, axis=1)
    return np.maximum.reduceat(apart, begins), others


def first_faults(reading: Reading, layers: int) -> list[FirstFault | None]:
    """Of each layer, the first step in which it saw NaN or infinity."""
    found: list[FirstFault | None] = [None] * layers
    steps = np.where(reading.first > 0, reading.first, np.iinfo(np.int64).max)
    for call, layer in enumerate(reading.calls):
        if not reading.first[:, call].any():
            continue
        step = int(steps[:, call].min())
        before = found[layer]
        if before is None or step < before.step:
            # JAX's statistics are those of all replicas; what tells them apart is the batch.
            own = steps[:, call] if reading.first_of_batch is None else reading.first_of_batch
            replicas = tuple(map(int, np.flatnonzero(own == step)))
            if len(own) == 1:
                replicas = (0,)
            found[layer] = FirstFault(layer, call, step, replicas)
    return found
