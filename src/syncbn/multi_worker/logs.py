"""What a step reports: of the whole global batch, the same on every replica and worker.

Keras averages the results of the replicas' own metrics, a mean of means; on several workers it
asks for the mean over axis 0 of scalars, and fails. Here the state of the metrics is summed over
all replicas by one collective, and their results are taken from the sums.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src import tree

from syncbn.multi_worker.replicas import SAME_SHAPE
from syncbn.multi_worker.share import Path, current_share, sharing

__all__ = ["ReportingStep"]


class Report(NamedTuple):
    """What one replica hands over after a step.

    `state`: the additive variables of the metrics, one flat vector a dtype. `averaged`: numbers
    times `examples`, of which the mean over all examples is the result; a loss is such a number.
    `other`: what cannot be added.
    """

    state: dict[str, Any]
    averaged: dict[int, Any]
    other: dict[int, Any]
    examples: Any


class ReportingStep:
    """A step of a model that also hands over the state of the metrics.

    Called on a replica, it runs the step; `logs` takes what `strategy.run` of it has returned. In
    between it keeps what is known while it is traced: how the step's outputs are nested, and which
    of them are results of metrics, whatever they are called there.
    """

    def __init__(self, model: Any, step: Callable[[Any], Any]) -> None:
        self.model = model
        self.step = step
        self._structure: Any = None
        self._results: dict[int, tuple[Any, Path]] = {}

    def __call__(self, data: Any) -> Report:
        """Run the step on this replica's part of the data."""
        with sharing(data) as share:
            outputs = self.step(data)
            leaves = tree.flatten(outputs)
            found = {index: share.result_of(value) for index, value in enumerate(leaves)}
            self._results = {index: result for index, result in found.items() if result}
            self._structure = tree.pack_sequence_as(outputs, list(range(len(leaves))))
            # Not before the data, should no metric follow from them: see `share`.
            with tf.control_dependencies([share.examples]):
                state = _packed(self._additive())
            report = Report(state, {}, {}, share.examples)
            for index, value in enumerate(leaves):
                if index in self._results:
                    continue
                if _is_number(value):
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
            with tf.name_scope(SAME_SHAPE):
                return strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)

        values = {}
        if report.averaged:
            examples = total(report.examples)
            for index, value in report.averaged.items():
                values[index] = tf.math.divide_no_nan(total(value), examples)
        for index, value in report.other.items():
            values[index] = strategy.experimental_local_results(value)[0]
        if self._results:
            state = {dtype: total(vector) for dtype, vector in report.state.items()}
            with keras.StatelessScope(state_mapping=_unpacked(state, self._additive())):
                whole = {metric: metric.result() for metric, _ in self._results.values()}
            for index, (metric, path) in self._results.items():
                values[index] = functools.reduce(operator.getitem, path, whole[metric])
        return tree.map_structure(lambda index: values[index], self._structure)

    @contextlib.contextmanager
    def noting_results(self) -> Iterator[None]:
        """While the step runs on the replicas, remember which tensors are results of metrics."""
        metrics = list(self.model.metrics)
        for metric in metrics:
            # Past Keras's own __setattr__, which tracks what it is given.
            vars(metric)["result"] = _noting(metric)
        try:
            yield
        finally:
            for metric in metrics:
                vars(metric).pop("result", None)

    def _additive(self) -> list[Any]:
        """The metrics' variables whose sum over the replicas is their value."""
        return [v for v in self.model.metrics_variables if v.aggregation == "sum"]


def _noting(metric: Any) -> Callable[[], Any]:
    original = metric.result

    @functools.wraps(original)
    def result() -> Any:
        value = original()
        share = current_share()
        if share is not None:
            share.note_result(metric, value)
        return value

    return result


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
