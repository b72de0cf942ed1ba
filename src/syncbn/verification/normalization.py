"""What a batch normalization should have given, by float64 NumPy over its own inputs.

This needs no second run: it holds for each layer by itself, also behind one that departs, and it
tells by which statistics a layer has normalized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from syncbn.moments import Moments, merge

__all__ = ["Normalization", "Statistics", "by_the_global_batch", "hypotheses"]


class Normalization(NamedTuple):
    """The call of a batch normalization on all replicas.

    Attributes:
        parts: by replica, inputs with the channels last, in float64.
        counts: by replica, the weight of each element, in float64; of the same shape without the
            channels.
        outputs: by replica, with the channels last.
        gamma: of each channel.
        beta: of each channel.
        epsilon: added to the variance.
        activation: applied to the outputs; None for none.
        groups: replicas that are to normalize together; None for all.
        has_mask: whether the layer was given one, which may let everything through.
    """

    parts: Mapping[int, Any]
    counts: Mapping[int, Any]
    outputs: Mapping[int, Any]
    gamma: Any
    beta: Any
    epsilon: float
    activation: Callable[[Any], Any] | None = None
    groups: Sequence[Sequence[int]] | None = None
    has_mask: bool = False

    def difference(self, statistics: Statistics) -> float:
        """How far the outputs are from those by these statistics, where elements count.

        Relative to the largest absolute value that the outputs should have.
        """
        gap, scale = 0.0, 0.0
        for replica, expected in self.expected(statistics):
            there = self.counts[replica] > 0
            own = np.asarray(self.outputs[replica], np.float64)[there]
            finite = np.isfinite(own) & np.isfinite(expected[there])
            if not np.all(finite):
                return float("nan")
            gap = max(gap, float(np.max(np.abs(own - expected[there]), initial=0.0)))
            scale = max(scale, float(np.max(np.abs(expected[there]), initial=0.0)))
        return gap / (scale or 1.0)

    def expected(self, statistics: Statistics) -> Iterator[tuple[int, Any]]:
        """What each replica's outputs should be."""
        for replica, x in self.parts.items():
            mean, variance = statistics[replica]
            scaled = (x - mean) / np.sqrt(variance + self.epsilon) * self.gamma + self.beta
            yield replica, scaled if self.activation is None else self.activation(scaled)

    def moments(self, replicas: Sequence[int], masked: bool = True) -> Moments:
        """Of the elements of these replicas together; with everything that is masked, if asked."""
        total = Moments(0.0, 0.0, 0.0)
        for replica in replicas:
            x, counts = self.parts[replica], self.counts[replica]
            weights = (counts if masked else np.ones_like(counts))[..., None]
            axes = tuple(range(x.ndim - 1))
            n = np.broadcast_to(np.sum(weights, axes), x.shape[-1:])
            x = np.where(weights > 0, x, 0.0)
            safe = np.maximum(n, np.finfo(np.float64).tiny)
            mean = np.sum(weights * x, axes) / safe
            m2 = np.sum(weights * (x - mean) ** 2, axes)
            total = merge(total, Moments(n, mean, m2), np)
        return total

    def conditioning(self) -> float:
        """The largest |mean| / √(variance + epsilon) of a channel: by it roundings grow."""
        whole = self.moments(list(self.parts))
        deviation = np.sqrt(whole.variance(np) + self.epsilon)
        return float(np.max(np.abs(whole.mean) / deviation, initial=0.0))

    def used_variance(self) -> tuple[float, float] | None:
        """In the channel that is furthest off, the variance that was used, and the right one.

        From `(y − beta) / gamma` against x: its slope is `1 / √(variance + epsilon)`. None where
        the outputs do not say.
        """
        if self.activation is not None:
            return None
        whole = self.moments(list(self.parts)).variance(np)
        ratios: list[tuple[Any, Any]] = []
        for replica, x in self.parts.items():
            there = self.counts[replica] > 0
            y = (np.asarray(self.outputs[replica], np.float64)[there] - self.beta) / self.gamma
            own = x[there]
            if len(own) < 2:
                continue
            centred = own - own.mean(axis=0)
            spread = np.sum(centred**2, axis=0)
            slope = np.sum(centred * y, axis=0) / np.where(spread > 0, spread, np.nan)
            used = 1.0 / slope**2 - self.epsilon
            ratios.extend(zip(used, whole, strict=True))
        usable = [pair for pair in ratios if np.isfinite(pair[0]) and pair[1] > 0]
        off = max(
            usable,
            key=lambda pair: abs(np.log((abs(pair[0]) + self.epsilon) / (pair[1] + self.epsilon))),
            default=None,
        )
        # Of outputs that are next to nothing 1 / slope² is rounding.
        return None if off is None else (max(0.0, float(off[0])), float(off[1]))


# By replica, mean and variance of each channel.
Statistics = Mapping[int, tuple[Any, Any]]


def _of(moments: Moments) -> tuple[Any, Any]:
    return moments.mean, moments.variance(np)


def by_the_global_batch(layer: Normalization) -> Statistics:
    """By which statistics it should have normalized."""
    replicas = list(layer.parts)
    return dict.fromkeys(replicas, _of(layer.moments(replicas)))


def hypotheses(layer: Normalization) -> dict[str, Statistics]:
    """By which other statistics a layer might have normalized."""
    replicas = list(layer.parts)
    local = {replica: layer.moments([replica]) for replica in replicas}
    unmasked = layer.moments(replicas, masked=False)
    present = [moments for moments in local.values() if np.any(moments.count)]
    mean = np.mean([moments.mean for moments in present], axis=0)
    square = np.mean([moments.variance(np) + moments.mean**2 for moments in present], axis=0)
    within = np.mean([moments.variance(np) for moments in present], axis=0)
    found: dict[str, Statistics] = {
        "local": {replica: _of(moments) for replica, moments in local.items()},
        "equal weights": dict.fromkeys(replicas, (mean, square - mean**2)),
        "equal weights, within": dict.fromkeys(replicas, (mean, within)),
        "without the mask": dict.fromkeys(replicas, _of(unmasked)),
        "local, without the mask": {
            replica: _of(layer.moments([replica], masked=False)) for replica in replicas
        },
    }
    if layer.groups is not None:
        found["groups"] = {
            replica: _of(layer.moments([one for one in group if one in local]))
            for group in layer.groups
            for replica in group
            if replica in local
        }
    return found
