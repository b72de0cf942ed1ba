"""What one device gives on the concatenated batch: float64 NumPy, no code of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Expected(NamedTuple):
    outputs: list[np.ndarray]  # one a replica
    input_gradients: list[np.ndarray]  # one a replica
    gamma_gradient: np.ndarray  # (C,), summed over replicas
    beta_gradient: np.ndarray  # (C,), summed over replicas
    count: np.ndarray  # (C,), of the union of all replicas, as the next two
    mean: np.ndarray  # (C,)
    variance: np.ndarray  # (C,), biased


class Renorm(NamedTuple):
    """Renormalization's state before the step, and its limits."""

    mean: np.ndarray  # (C,)
    stddev: np.ndarray  # (C,)
    rmin: float = 0.0
    rmax: float = np.inf
    dmax: float = np.inf


# Each with its derivative.
ACTIVATIONS: dict[str | None, tuple[Callable[..., Any], Callable[..., Any]]] = {
    None: (lambda z: z, np.ones_like),
    "linear": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.2 * z), lambda z: np.where(z > 0, 1.0, 0.2)),
    "elu": (
        lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
        lambda z: np.where(z > 0, 1.0, np.exp(np.minimum(z, 0))),
    ),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "silu": (
        lambda z: z / (1 + np.exp(-z)),
        lambda z: (1 + np.exp(-z) + z * np.exp(-z)) / (1 + np.exp(-z)) ** 2,
    ),
}


def batch_normalization(
    parts: list[np.ndarray],
    cotangents: list[np.ndarray],
    axis: int,
    gamma: np.ndarray,
    beta: np.ndarray,
    epsilon: float,
    *,
    weights: list[np.ndarray] | None = None,
    labels: list[np.ndarray] | None = None,
    renorm: Renorm | None = None,
    activation: str | None = None,
) -> Expected:
    """Normalize the parts as the one batch that they are, and pull the cotangents back.

    Args:
        parts: the batch by replica.
        cotangents: of the outputs.
        axis: that of the channels.
        gamma: shape (C,).
        beta: shape (C,).
        epsilon: added to the variance.
        weights: of each element, the shape of the part; ones by default.
        labels: of each example, the number of the group that it is normalized with.
        renorm: with batch renormalization, its state.
        activation: by Keras's name.
    """
    x = _rows(parts, axis, len(gamma))
    dy = _rows(cotangents, axis, len(gamma))
    w = np.ones_like(x) if weights is None else _rows(weights, axis, len(gamma))
    group_of = np.zeros(len(x), int)
    if labels is not None:
        group_of = np.concatenate(
            [
                np.repeat(own, part.size // max(len(part), 1) // len(gamma))
                for own, part in zip(labels, parts, strict=True)
            ]
        )
    y, dx = np.zeros_like(x), np.zeros_like(x)
    of_gamma, of_beta = np.zeros(len(gamma)), np.zeros(len(gamma))
    for group in np.unique(group_of):
        own = group_of == group
        # In the tests' own arrays nothing is NaN: what is masked is there, and must not count.
        y[own], dx[own], *sums = _one_group(
            x[own], dy[own], w[own], gamma, beta, epsilon, renorm, ACTIVATIONS[activation]
        )
        of_gamma, of_beta = of_gamma + sums[0], of_beta + sums[1]
    count, mean, variance = moments(x, w)
    return Expected(
        _split(y, parts, axis), _split(dx, parts, axis), of_gamma, of_beta, count, mean, variance
    )


def moments(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted count, mean and biased variance of rows; zeros of nothing."""
    count = w.sum(axis=0)
    divisor = np.where(count > 0, count, 1.0)
    mean = (w * x).sum(axis=0) / divisor
    return count, mean, (w * (x - mean) ** 2).sum(axis=0) / divisor


def _one_group(
    x: np.ndarray,
    dy: np.ndarray,
    w: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    epsilon: float,
    renorm: Renorm | None,
    activation: tuple[Callable[..., Any], Callable[..., Any]],
) -> tuple[np.ndarray, ...]:
    """Outputs, and the gradients by x, gamma and beta."""
    count, mean, variance = moments(x, w)
    inverse = 1.0 / np.sqrt(variance + epsilon)
    normalized = (x - mean) * inverse
    r, d = np.ones_like(gamma), np.zeros_like(gamma)
    if renorm is not None:
        stddev = np.maximum(renorm.stddev, np.sqrt(epsilon))
        r = np.clip(1 / inverse / stddev, renorm.rmin, renorm.rmax)
        d = np.clip((mean - renorm.mean) / stddev, -renorm.dmax, renorm.dmax)
    corrected = normalized * r + d
    z = corrected * gamma + beta
    # An element of weight 0 does not exist: nothing of its cotangent goes anywhere.
    dz = np.where(w > 0, dy * activation[1](z), 0.0)
    of_beta, of_normalized = dz.sum(axis=0), (dz * normalized).sum(axis=0)
    n = np.where(count > 0, count, 1.0)
    dx = gamma * r * inverse * (dz - w * of_beta / n - w * normalized * of_normalized / n)
    return activation[0](z), dx, (dz * corrected).sum(axis=0), of_beta


def _rows(arrays: list[np.ndarray], axis: int, channels: int) -> np.ndarray:
    return np.concatenate(
        [np.moveaxis(a.astype(np.float64), axis, -1).reshape(-1, channels) for a in arrays]
    )


def _split(rows: np.ndarray, parts: list[np.ndarray], axis: int) -> list[np.ndarray]:
    """Rows of channels back into the shapes of the parts."""
    result, start = [], 0
    for part in parts:
        shape = np.moveaxis(part, axis, -1).shape
        count = int(np.prod(shape[:-1]))
        result.append(np.moveaxis(rows[start : start + count].reshape(shape), -1, axis))
        start += count
    return result


def moved(old: np.ndarray, batch: np.ndarray, momentum: float) -> np.ndarray:
    """A step of the moving average."""
    return old * momentum + batch * (1 - momentum)
