"""The functions of a train and a test step: no graph within a loop's graph, and global logs.

Keras wraps the step into a `tf.function` of its own and calls it inside the loop of
`steps_per_execution`: `merge_call` is refused there. XLA cannot compile across a collective at all.
The batch of `train_on_batch` and `test_on_batch` is given to every replica as a whole by Keras.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src import tree
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.trainers.trainer import Trainer

from syncbn.errors import UnsupportedFeatureError
from syncbn.multi_worker.logs import ReportingStep
from syncbn.multi_worker.progress import progress
from syncbn.multi_worker.repair import Patch, source_probe
from syncbn.multi_worker.replicas import is_multi_worker, replica_count
from syncbn.multi_worker.rings import numbers
from syncbn.multi_worker.splitting import split

__all__ = ["is_needed", "patches"]


def is_needed() -> bool:
    """Whether Keras puts the step into a graph of its own, also on replicas."""
    return source_probe(
        "keras.src.backend.tensorflow.trainer.TensorFlowTrainer._make_function",
        broken="if not self.run_eagerly: one_step_on_data = tf.function(",
        mended="num_replicas_in_sync",
    )


def patches() -> list[Patch]:
    """`_make_function` of the trainer; `compile`, for an argument that cannot be served."""
    return [
        Patch(TensorFlowTrainer, "_make_function", _maker),
        Patch(Trainer, "compile", _compiler),
    ]


def refuse_xla(model: Any) -> None:
    """Say so where XLA was asked for on replicas.

    Raises:
        UnsupportedFeatureError: always then.
    """
    replicas = replica_count(model.distribute_strategy)
    if model.jit_compile is True and replicas > 1:
        raise UnsupportedFeatureError(
            f"compile(jit_compile=…) on the {replicas} replicas of "
            f"{type(model.distribute_strategy).__name__} requires 'auto' or False: XLA cannot "
            "compile across tf.distribute's collectives. Received: True."
        )


def _compiler(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compile(model: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A001 - Keras's name
        result = original(model, *args, **kwargs)
        refuse_xla(model)
        return result

    return compile


def _maker(original: Callable[..., Any]) -> Callable[..., Any]:
    def _make_function(model: Any, step_function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if replica_count(model.distribute_strategy) == 1:
            return original(model, step_function)  # type: ignore[no-any-return]
        refuse_xla(model)
        return _function_on_replicas(model, step_function)

    return _make_function


def _function_on_replicas(model: Any, step_function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    strategy = model.distribute_strategy
    step = ReportingStep(model, step_function)

    def on_replica(data: Any) -> Any:
        return step(_without_empty(data))

    def on_data(data: Any) -> Any:
        with step.noting_results():
            report = strategy.run(on_replica, args=(data,))
        return step.logs(report, strategy)

    def on_iterator(iterator: Any) -> Any:
        if model.steps_per_execution == 1:
            return tf.experimental.Optional.from_value(on_data(iterator.get_next()))
        beat = progress.beat if is_multi_worker(strategy) else None
        return _loop(on_data, iterator, model.steps_per_execution, beat)

    def compiled(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if model.run_eagerly:
            return function
        return tf.function(function, reduce_retracing=True, autograph=False)  # type: ignore[no-any-return]

    run_on_data, run_on_iterator = compiled(on_data), compiled(on_iterator)

    def function(iterator: Any) -> Any:
        try:
            with numbers.call():
                return run(iterator)
        except tf.errors.InternalError as error:
            explain(error)
            raise

    def run(iterator: Any) -> Any:
        if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            outputs = run_on_iterator(iterator)
            if not outputs.has_value():
                raise StopIteration
            return outputs.get_value()
        for _, data in zip(range(model.steps_per_execution), iterator, strict=False):
            outputs = run_on_data(split(strategy, data))
        return outputs

    return function


def _without_empty(data: Any) -> Any:
    """A generator's None comes as an empty Optional."""
    return tree.map_structure(
        lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data
    )


def explain(error: tf.errors.InternalError) -> None:
    """Say what TensorFlow's error means where a replica had no examples.

    Raises:
        UnsupportedFeatureError: a kernel of oneDNN failed at an empty part of a batch.
    """
    if "Missing 1-th output" in str(error) and "BackpropFilter" in str(error):
        raise UnsupportedFeatureError(
            "A convolution with a bias requires that every replica has an example of each batch: "
            "TensorFlow's oneDNN kernel of its gradient fails without. Received: an empty part, of "
            "a last batch smaller than the number of replicas. Drop the bias, which a following "
            "normalization cancels anyway, drop the remainder, or set TF_ENABLE_ONEDNN_OPTS=0 in "
            "the environment."
        ) from error


def _loop(
    on_data: Callable[[Any], Any], iterator: Any, steps: int, beat: Callable[[], None] | None
) -> Any:
    """At most so many steps, fewer where the data end; the outputs of the last, if any.

    As Keras writes it: the outputs' structure is known only once the loop's body is traced.
    """
    outputs_of_none = tf.experimental.Optional.empty(None)

    def is_left(step: Any, _: Any, data: Any) -> Any:
        return tf.logical_and(step < steps, data.has_value())

    def body(step: Any, _: Any, data: Any) -> tuple[Any, Any, Any]:
        if beat is not None:
            # A call of many steps is long, and not late.
            tf.py_function(beat, [], [])
        outputs = tf.experimental.Optional.from_value(on_data(data.get_value()))
        outputs_of_none._element_spec = outputs.element_spec
        following = tf.cond(step + 1 < steps, iterator.get_next_as_optional, lambda: data)
        return step + 1, outputs, following

    loop = [tf.constant(0), outputs_of_none, iterator.get_next_as_optional()]
    _, outputs, _ = tf.while_loop(is_left, body, loop_vars=loop)
    outputs._element_spec = outputs_of_none.element_spec
    return outputs
