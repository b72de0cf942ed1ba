"""What one device gives, in float64 NumPy: batch normalization, and training by SGD.

Written from the formulas alone; the library that is tested has no part in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Network", "Normalized", "largest_gap", "normalize"]


class Normalized(NamedTuple):
    """Batch normalization of one batch of rows, and its gradients by a cotangent of the outputs."""

    outputs: Any
    input_gradient: Any
    gamma_gradient: Any
    beta_gradient: Any
    mean: Any
    variance: Any  # biased


def normalize(x: Any, cotangent: Any, gamma: Any, beta: Any, epsilon: float) -> Normalized:
    """Closed form over the rows of x, which are the batches of all replicas, one after another."""
    x, cotangent = np.asarray(x, np.float64), np.asarray(cotangent, np.float64)
    count = len(x)
    mean = x.sum(axis=0) / count
    centred = x - mean
    variance = (centred**2).sum(axis=0) / count
    deviation = np.sqrt(variance + epsilon)
    unit = centred / deviation
    of_beta = cotangent.sum(axis=0)
    of_gamma = (cotangent * unit).sum(axis=0)
    gradient = gamma / deviation * (cotangent - (of_beta + unit * of_gamma) / count)
    return Normalized(unit * gamma + beta, gradient, of_gamma, of_beta, mean, variance)


class Network:
    """Dense, batch normalization, ReLU, dense; mean squared error; SGD with momentum.

    `weights`: those of Keras's model, in its order: kernel, gamma, beta, moving mean, moving
    variance, kernel, bias.
    """

    def __init__(
        self, weights: list[Any], rate: float, momentum: float, epsilon: float, moving: float
    ) -> None:
        self.weights = [np.asarray(weight, np.float64) for weight in weights]
        self.rate = rate
        self.momentum = momentum
        self.epsilon = epsilon
        self.moving = moving
        self._velocities = [np.zeros_like(weight) for weight in self.weights]

    def step(self, x: Any, y: Any) -> float:
        """Train on one global batch; returns its loss."""
        first, gamma, beta, _, _, second, bias = self.weights
        before = x @ first
        normalized = normalize(before, np.zeros_like(before), gamma, beta, self.epsilon)
        hidden = np.maximum(normalized.outputs, 0.0)
        error = hidden @ second + bias - y
        of_prediction = 2.0 * error / error.size
        of_hidden = of_prediction @ second.T * (normalized.outputs > 0)
        back = normalize(before, of_hidden, gamma, beta, self.epsilon)
        gradients = {
            0: x.T @ back.input_gradient,
            1: back.gamma_gradient,
            2: back.beta_gradient,
            5: hidden.T @ of_prediction,
            6: of_prediction.sum(axis=0),
        }
        for index, gradient in gradients.items():
            self._velocities[index] = self.momentum * self._velocities[index] - self.rate * gradient
            self.weights[index] = self.weights[index] + self._velocities[index]
        for index, value in ((3, back.mean), (4, back.variance)):
            self.weights[index] = self.weights[index] * self.moving + value * (1 - self.moving)
        return float((error**2).mean())

    def epoch(self, batches: list[tuple[Any, Any]]) -> float:
        """Train on global batches in their order; the mean loss of an example."""
        losses = [(self.step(x, y), len(x)) for x, y in batches]
        return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


def largest_gap(observed: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value; infinite where shapes differ.

    NaN where anything observed is NaN, which is within no bound.
    """
    observed, expected = np.asarray(observed, np.float64), np.asarray(expected, np.float64)
    if observed.shape != expected.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    return float(np.abs(observed - expected).max() / (np.abs(expected).max() or 1.0))
