"""What one device gives on the concatenated batch: float64 NumPy, no code of the library."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Expected(NamedTuple):
    outputs: list[np.ndarray]  # one a replica
    input_gradients: list[np.ndarray]  # one a replica
    gamma_gradient: np.ndarray  # (C,), summed over replicas
    beta_gradient: np.ndarray  # (C,), summed over replicas
    mean: np.ndarray  # (C,)
    variance: np.ndarray  # (C,), biased


def batch_normalization(
    parts: list[np.ndarray],
    cotangents: list[np.ndarray],
    axis: int,
    gamma: np.ndarray,
    beta: np.ndarray,
    epsilon: float,
) -> Expected:
    """Normalize the parts as the one batch that they are, and pull the cotangents back."""
    rows = [np.moveaxis(p.astype(np.float64), axis, -1).reshape(-1, len(gamma)) for p in parts]
    x = np.concatenate(rows)
    dy = np.concatenate(
        [np.moveaxis(c.astype(np.float64), axis, -1).reshape(-1, len(gamma)) for c in cotangents]
    )
    if len(x):
        mean, variance = x.mean(axis=0), x.var(axis=0)
    else:
        mean, variance = np.zeros(len(gamma)), np.zeros(len(gamma))
    inverse = 1.0 / np.sqrt(variance + epsilon)
    normalized = (x - mean) * inverse
    n = max(len(x), 1)
    beta_gradient, gamma_gradient = dy.sum(axis=0), (dy * normalized).sum(axis=0)
    dx = gamma * inverse * (dy - beta_gradient / n - normalized * gamma_gradient / n)
    return Expected(
        _split(normalized * gamma + beta, parts, axis),
        _split(dx, parts, axis),
        gamma_gradient,
        beta_gradient,
        mean,
        variance,
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
