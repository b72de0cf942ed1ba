"""Runs the layer on replicas with data of their own, and compares with the oracle."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np
import pytest

import syncbn
from tests import oracle

# The shape of an example, and the axis of the channels.
RANKS_AND_AXES = [
    ((6,), -1),
    ((5, 6), -1),
    ((5, 6), 1),
    ((6, 5), 1),
    ((4, 5, 6), -1),
    ((6, 4, 5), 1),
    ((4, 6, 5), 2),
    ((2, 3, 4, 6), -1),
    ((6, 2, 3, 4), 1),
]


# Replicas, and what they are grouped by.
PARTITIONS = [
    (4, {"group_size": 1}),
    (4, {"group_size": 2}),
    (4, {"group_size": 4}),
    (6, {"group_size": 3}),
    (3, {"group_assignment": [[2], [1, 0]]}),
    (4, {"group_assignment": [[3, 0], [1, 2]]}),
    (4, {"group_assignment": ((0,), (1,), (2, 3))}),
    (2, {"group_assignment": [[1], [0]]}),
]


class Observed(NamedTuple):
    outputs: list[np.ndarray]  # one a replica, as all of these
    input_gradients: list[np.ndarray]
    gamma_gradients: list[np.ndarray]
    beta_gradients: list[np.ndarray]
    moving_means: list[np.ndarray]
    moving_variances: list[np.ndarray]
    # Every weight of the layer after the step, by name; one a replica.
    weights: Mapping[str, list[np.ndarray]] = MappingProxyType({})

    def state(self) -> dict[str, np.ndarray]:
        """What the next step of `observe` starts from, of a layer whose replicas agree."""
        for name, copies in self.weights.items():
            assert len({copy.tobytes() for copy in copies}) == 1, f"{name} differs on replicas"
        return {name: copies[0] for name, copies in self.weights.items()}


class Case(NamedTuple):
    """Data for the replicas, and the weights that every one of them holds."""

    parts: list[np.ndarray]
    cotangents: list[np.ndarray]
    axis: int
    gamma: np.ndarray
    beta: np.ndarray
    epsilon: float = 1e-3
    momentum: float | None = 0.9
    masks: list[np.ndarray] | None = None  # as the layer gets them, one a replica
    weights: list[np.ndarray] | None = None  # as the layer gets them, one a replica
    options: Mapping[str, Any] = MappingProxyType({})  # further arguments of the layer

    def expected(self) -> oracle.Expected:
        return oracle.batch_normalization(
            self.parts,
            self.cotangents,
            self.axis,
            self.gamma,
            self.beta,
            self.epsilon,
            weights=self.element_weights(),
            labels=self.labels(),
            renorm=self.renorm(),
            activation=self.options.get("activation"),
        )

    def element_weights(self) -> list[np.ndarray] | None:
        """What each element counts, by the mask and the weights together, of the parts' shapes."""
        if self.masks is None and self.weights is None:
            return None
        result = []
        for replica, part in enumerate(self.parts):
            total = np.ones(part.shape)
            if self.weights is not None:
                weight = np.asarray(self.weights[replica], np.float64)
                # A number for each example, as Keras's sample_weight.
                if weight.ndim == 1:
                    weight = weight.reshape(-1, *(1,) * (part.ndim - 2))
                total = total * (np.expand_dims(weight, self.axis) if weight.ndim else weight)
            if self.masks is not None:
                # Keras's masks have no last axis, wherever the channels are.
                total = np.where(self.masks[replica][..., None], total, 0.0)
            result.append(total)
        return result

    def labels(self) -> list[np.ndarray]:
        """The group of each example, by what the layer was asked for."""
        replicas = range(len(self.parts))
        groups = self.options.get("group_assignment")
        if size := self.options.get("group_size"):
            groups = [[r for r in replicas if r // size == g] for g in replicas]
        if size := self.options.get("virtual_batch_size"):
            return [1000 * r + np.arange(len(self.parts[r])) // size for r in replicas]
        group_of = {r: g for g, members in enumerate(groups or [replicas]) for r in members}
        return [np.full(len(self.parts[r]), group_of[r]) for r in replicas]

    def renorm(self) -> oracle.Renorm | None:
        """Renormalization's state in a new layer."""
        if not self.options.get("renorm"):
            return None
        zeros = np.zeros(len(self.gamma))
        return oracle.Renorm(zeros, zeros + 1, **self.options.get("renorm_clipping") or {})


def make_case(
    shapes: list[tuple[int, ...]],
    axis: int = -1,
    dtype: str = "float32",
    offset: float = 0.0,
    seed: int = 0,
) -> Case:
    """Standard normal data around an offset, different on every replica, and random cotangents."""
    rng = np.random.default_rng(seed)
    channels = shapes[0][axis]
    data_type = dtype_of(dtype)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(size=shape).astype(data_type)

    return Case(
        parts=[(normal(shape).astype(np.float64) + offset).astype(data_type) for shape in shapes],
        cotangents=[normal(shape) for shape in shapes],
        axis=axis,
        gamma=rng.uniform(0.5, 1.5, channels).astype(np.float32).astype(np.float64),
        beta=rng.normal(size=channels).astype(np.float32).astype(np.float64),
    )


def masked_case(shapes: list[tuple[int, ...]], kept: float = 0.6, **arguments: Any) -> Case:
    """A case with so large a share of its elements left by the masks."""
    rng = np.random.default_rng(3)
    masks = [rng.random(shape[:-1]) < kept for shape in shapes]
    return make_case(shapes, **arguments)._replace(masks=masks)


def shapes_around(axis: int, channels: int) -> list[tuple[int, ...]]:
    """Of two replicas, with so many channels on the axis."""
    shape = [5, 4]
    shape.insert(2 if axis == -1 else axis - 1, channels)
    return [(9, *shape), (7, *shape)]


def grouped_case(replicas: int, **options: Any) -> Case:
    """Replicas with more and more examples each."""
    return make_case([(5 + 3 * r, 6, 4) for r in range(replicas)])._replace(options=options)


def dtype_of(name: str) -> Any:
    """NumPy's dtype of that name; NumPy itself has no bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def observe(case: Case, *, mode: str = "graph", **arguments: Any) -> Observed:
    """What the replicas see in one step, on the backend that Keras runs on.

    Args:
        case: data and weights; as many replicas as it has parts.
        mode: "graph" or "eager": compiled as a step is by the framework, or not.
        **arguments: of the backend's own `observe`, each of them:
            `dtype`: the layer's policy, by default the data's own;
            `training`: what the layer is called with, by default True;
            `state`: values of the layer's weights by name, which it holds before the step;
            any other is an argument of the layer, as `trainable`, which holds for the step.
    """
    backend = importlib.import_module(f"tests.replicas.{keras.backend.backend()}")
    observed: Observed = backend.observe(case, mode=mode, **arguments)
    return observed


# Backends that have no float64 unless the whole process is told to compute in it.
MERGES_IN_FLOAT32 = ("jax",)

# What needs an error raised by values that only the step itself knows.
_STOPS_BY_VALUES = ("nan_check", "save")


def unsupported(case: Case, mode: str) -> bool:
    """Whether the case asks for what this backend refuses by an UnsupportedFeatureError.

    The one table of it. JAX compiles, and maps over replicas, without any values at hand.
    """
    asked = any(case.options.get(name) not in (None, False, "input") for name in _STOPS_BY_VALUES)
    compiles = mode == "graph" or len(case.parts) > 1
    return asked and compiles and keras.backend.backend() == "jax"


def assert_step_equals_one_device(case: Case, tolerance: float, mode: str = "graph") -> None:
    """A step of the case equals one device, or is refused where `unsupported` says so."""
    if unsupported(case, mode):
        with pytest.raises(syncbn.UnsupportedFeatureError):
            observe(case, mode=mode)
    else:
        assert_equals_one_device(case, observe(case, mode=mode), tolerance)


def numbers(tensor: Any) -> np.ndarray:
    """The values of a tensor or variable of any framework."""
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def assert_variance_at_a_large_mean(offset: float, tolerance: float) -> None:
    # Means differ between the replicas too, so that the merge has something to merge.
    case = make_case([(512, 4), (300, 4)], offset=offset)
    case = case._replace(parts=[part + r for r, part in enumerate(case.parts)], momentum=0.0)
    variance = observe(case).moving_variances[0]
    assert np.abs(variance / case.expected().variance - 1).max() <= tolerance


def whole_numbers_at_a_large_mean() -> Case:
    """Integers and halves are exact in float32 here, so all of an error is the layer's own."""
    rng = np.random.default_rng(0)
    parts = [(rng.integers(-6, 7, (size, 3)) / 2 + 4096).astype("f4") for size in (40, 24)]
    return make_case([(40, 3), (24, 3)])._replace(parts=parts)


def assert_close(name: str, observed: Any, expected: Any, tolerance: float) -> None:
    """The largest difference, relative to the largest expected value, is within the tolerance."""
    observed, expected = np.asarray(observed, np.float64), np.asarray(expected, np.float64)
    assert observed.shape == expected.shape, f"{name}: shape {observed.shape}"
    if expected.size == 0:
        return
    scale = np.abs(expected).max()
    difference = np.abs(observed - expected).max() / (scale or 1.0)
    # Written so that a NaN fails.
    assert difference <= tolerance, f"{name}: off by {difference:.2e}, allowed {tolerance:.0e}"


def assert_equals_one_device(case: Case, observed: Observed, tolerance: float) -> None:
    """Everything of contract 1 and 2, against the oracle."""
    expected = case.expected()

    def joined(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])

    assert_close("outputs", joined(observed.outputs), joined(expected.outputs), tolerance)
    for own, its in zip(observed.outputs, expected.outputs, strict=True):
        assert own.shape == its.shape
    assert_close(
        "input gradients",
        joined(observed.input_gradients),
        joined(expected.input_gradients),
        tolerance,
    )
    gamma_gradient = np.sum(np.asarray(observed.gamma_gradients, np.float64), axis=0)
    beta_gradient = np.sum(np.asarray(observed.beta_gradients, np.float64), axis=0)
    assert_close("gamma gradient", gamma_gradient, expected.gamma_gradient, tolerance)
    assert_close("beta gradient", beta_gradient, expected.beta_gradient, tolerance)
    assert_statistics(case, observed, tolerance)


def assert_statistics(case: Case, observed: Observed, tolerance: float) -> None:
    """Moving statistics moved as one device moves them, bitwise the same on every replica."""
    for name, moving, step in zip(
        ("moving mean", "moving variance"),
        (observed.moving_means, observed.moving_variances),
        expected_statistics(case),
        strict=True,
    ):
        assert len({array.tobytes() for array in moving}) == 1, f"{name} differs between replicas"
        assert_close(name, moving[0], step, tolerance)


def expected_statistics(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Moving mean and moving variance of a new layer after one step, by the oracle."""
    expected = case.expected()
    mean, variance = expected.mean, expected.variance
    count = expected.count
    if case.options.get("unbiased_moving_variance"):
        # Of a sum of weights between 1 and 2 no n − 1 is taken, which would be next to nothing.
        variance = variance * count / np.where(count > 2, count - 1, np.clip(count, 1e-9, 1))
    # The first batch is the average of all batches so far.
    momentum = 0.0 if case.momentum is None else case.momentum
    momentum = np.where(count > 0, momentum, 1.0)
    moved_variance = oracle.moved(np.ones_like(variance), variance, momentum)
    if case.options.get("renorm") and count.any():
        deviation = oracle.moved(np.ones_like(variance), np.sqrt(variance + case.epsilon), momentum)
        moved_variance = np.maximum(deviation**2 - case.epsilon, 0)
    return oracle.moved(np.zeros_like(mean), mean, momentum), moved_variance
