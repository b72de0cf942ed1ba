"""What a step reports: of the whole global batch, the same on every replica and worker.

Keras averages the results of the replicas' own metrics, a mean of means; on several workers it
asks for the mean over axis 0 of scalars, and fails. Here the state of the metrics is summed over
all replicas by one collective, and their results are taken from the sums.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src import tree
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

from syncbn.multi_worker.share import Share, sharing

__all__ = ["ReportingStep"]

_STEPS = (TensorFlowTrainer.train_step, TensorFlowTrainer.test_step)


class Report(NamedTuple):
    """What one replica hands over after a step.

    `state`: the additive variables of the metrics, one flat vector a dtype. `summed`: numbers whose
    sum over the replicas is the result. `averaged`: numbers times `examples`, of which the mean
    over all examples is the result. `other`: what cannot be added.
    """

    state: dict[str, Any]
    summed: dict[int, Any]
    averaged: dict[int, Any]
    other: dict[int, Any]
    examples: Any


class ReportingStep:
    """A step of a model that also hands over the state of the metrics.

    Called on a replica, it runs the step; `logs` takes what `strategy.run` of it has returned. In
    between it keeps what is known while it is traced: how the step's outputs are nested, and which
    of them are results of metrics.
    """

    def __init__(self, model: Any, step: Callable[[Any], Any]) -> None:
        self.model = model
        self.step = step
        self._structure: Any = None
        self._metrics: dict[int, tuple[str, ...]] = {}

    def __call__(self, data: Any) -> Report:
        """Run the step on this replica's part of the data."""
        with sharing(data) as share:
            outputs = self.step(data)
            self._metrics = self._paths(outputs, share)
            leaves = tree.flatten(outputs)
            self._structure = tree.pack_sequence_as(outputs, list(range(len(leaves))))
            report = Report(_packed(self._additive()), {}, {}, {}, share.examples)
            for index, value in enumerate(leaves):
                if index in self._metrics:
                    continue
                if share.is_loss(value):
                    report.summed[index] = tf.convert_to_tensor(value)
                elif _is_number(value):
                    number = tf.cast(value, tf.float32)
                    # 0 / 0 where this replica is empty.
                    number = tf.where(share.examples > 0, number, tf.zeros_like(number))
                    report.averaged[index] = number * share.examples
                else:
                    report.other[index] = value
        return report

    def logs(self, report: Report, strategy: tf.distribute.Strategy) -> Any:
        """The results of the global batch, nested as the step's outputs are."""

        def total(value: Any) -> Any:
            return strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)

        values = {index: total(value) for index, value in report.summed.items()}
        if report.averaged:
            examples = total(report.examples)
            for index, value in report.averaged.items():
                values[index] = tf.math.divide_no_nan(total(value), examples)
        for index, value in report.other.items():
            values[index] = strategy.experimental_local_results(value)[0]
        if self._metrics:
            state = {dtype: total(vector) for dtype, vector in report.state.items()}
            with keras.StatelessScope(state_mapping=_unpacked(state, self._additive())):
                results = self._results()
            for index, path in self._metrics.items():
                values[index] = functools.reduce(operator.getitem, path, results)
        return tree.map_structure(lambda index: values[index], self._structure)

    def _additive(self) -> list[Any]:
        """The metrics' variables whose sum over the replicas is their value."""
        return [v for v in self.model.metrics_variables if v.aggregation == "sum"]

    def _results(self) -> dict[str, Any]:
        """By name: of every metric, and of those that one metric contains."""
        nested = {metric.name: metric.result() for metric in self.model.metrics}
        return {**nested, **self.model.get_metrics_result()}

    def _paths(self, outputs: Any, share: Share) -> dict[int, tuple[str, ...]]:
        """Which leaves of the outputs are results of metrics, and where they are in `_results`.

        Those of `get_metrics_result`; in a `train_step` of the user's also what bears the name of
        a metric. Not "loss", unless he has such a metric: he returns a loss then, and Keras's own
        tracker of it, which goes by the same name, has not been told.
        """
        if not isinstance(outputs, dict):
            return {}
        results = self._results()
        tracker = getattr(self.model, "_loss_tracker", None)
        own = getattr(self.step, "__func__", None) not in _STEPS
        untold = {tracker.name} if own and tracker is not None else set()
        untold -= {metric.name for metric in self.model._metrics}
        paths = {}
        for index, (path, value) in enumerate(tree.flatten_with_path(outputs)):
            found = _at(results, path)
            if found and (path[0] not in untold or id(value) in share.results):
                paths[index] = tuple(path)
        return paths


def _at(results: Any, path: tuple[Any, ...]) -> bool:
    """Whether there is one result, not a dict of them, at that place."""
    for key in path:
        if not isinstance(results, dict) or key not in results:
            return False
        results = results[key]
    return not isinstance(results, dict)


def _is_number(value: Any) -> bool:
    value = tf.convert_to_tensor(value)
    return bool(value.dtype.is_floating or value.dtype.is_integer)


def _packed(variables: list[Any]) -> dict[str, Any]:
    """Their values on this replica, flat, one vector a dtype."""
    parts: dict[str, list[Any]] = {}
    for variable in variables:
        value = tf.convert_to_tensor(variable.value)
        parts.setdefault(value.dtype.name, []).append(tf.reshape(value, [-1]))
    return {dtype: tf.concat(vectors, 0) for dtype, vectors in parts.items()}


def _unpacked(state: dict[str, Any], variables: list[Any]) -> list[tuple[Any, Any]]:
    """Each variable with its part of the vector of its dtype."""
    mapping, offsets = [], dict.fromkeys(state, 0)
    for variable in variables:
        dtype, size = tf.as_dtype(variable.dtype).name, variable.value.shape.num_elements()
        part = state[dtype][offsets[dtype] : offsets[dtype] + size]
        offsets[dtype] += size
        mapping.append((variable, tf.reshape(part, variable.value.shape)))
    return mapping
