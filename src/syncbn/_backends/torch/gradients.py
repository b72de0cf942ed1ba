"""`fit` by several processes of `torch.distributed` as one training: Keras 3.15 gives none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from torch import distributed

from syncbn.errors import InputError, NotSynchronizableError

__all__ = ["average_gradients"]


def average_gradients(model: Any, process_group: Any = None) -> None:
    """Make `fit` and `evaluate` of all processes one training, by the mean over their examples.

    In every step the gradient is `Σ_r n_r · g_r / Σ_r n_r`, where g_r is that of process r, whose
    loss is a mean over its n_r examples: that of the mean over the examples of all processes, also
    where they hold different numbers. One all-reduce a step for all gradients of a dtype. The
    weights start as those of the first process. Logs at the end of an epoch and of `evaluate` are
    by the metrics of all processes together, so that callbacks decide alike everywhere; within an
    epoch, and after each batch, they are a process's own.

    Prefer `torch.nn.parallel.DistributedDataParallel` in a training loop of your own: it overlaps
    communication with the backward pass. Keras's `fit` does not call it.

    Every process must call `fit` and `evaluate` alike, with as many batches as the others, and
    feeds its own part of the data; one that does less leaves the others waiting until the process
    group's own timeout. Dropout draws by each process's own seed.

    Args:
        model: built and compiled; Keras on torch. Compiled anew, it has to be given again.
        process_group: of `torch.distributed`; None for all processes.

    Raises:
        NotSynchronizableError: Keras runs on something else, or there is no process group.
        InputError: the model is not built, or not compiled.
    """
    _check(model)
    if getattr(model.optimizer, _MARK, False):
        return
    for variable in model.weights:
        first = distributed.get_global_rank(process_group or distributed.group.WORLD, 0)
        distributed.broadcast(variable.value.data, first, group=process_group)
    step = _Step(process_group, model.train_step, model.get_metrics_result, model.optimizer.apply)
    model.train_step = step.train_step
    model.get_metrics_result = lambda: step.metrics_result(model)
    model.optimizer.apply = step.apply
    setattr(model.optimizer, _MARK, True)


_MARK = "_syncbn_averages_gradients"


def _check(model: Any) -> None:
    if keras.backend.backend() != "torch":
        raise NotSynchronizableError(
            "average_gradients requires Keras on torch. Received: keras.backend.backend()="
            f"{keras.backend.backend()!r}. On TensorFlow take a tf.distribute strategy, on JAX "
            "keras.distribution."
        )
    if not (distributed.is_available() and distributed.is_initialized()):
        raise NotSynchronizableError(
            "average_gradients requires a process group. Received: none. Call "
            "torch.distributed.init_process_group first, in every process, as `syncbn launch "
            "--backend torch` and torchrun start them."
        )
    if not model.built or getattr(model, "optimizer", None) is None:
        what = "not compiled" if model.built else "without weights"
        raise InputError(
            f"average_gradients requires a model that is built and compiled. Received: one that is "
            f"{what}. Call model.build(input_shape) and model.compile(...) before."
        )


class _Step:
    """One step of training, between what Keras's trainer does before and after it."""

    def __init__(
        self,
        group: Any,
        train_step: Callable[[Any], Any],
        metrics_result: Callable[[], Any],
        apply: Callable[..., Any],
    ) -> None:
        self._group = group
        self._train_step = train_step
        self._metrics_result = metrics_result
        self._apply = apply
        self._examples = 0
        self._inside = False

    def train_step(self, data: Any) -> Any:
        """Keras's own, which calls the two below."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        self._examples = next(part for part in keras.tree.flatten(x) if part is not None).shape[0]
        self._inside = True
        try:
            return self._train_step(data)
        finally:
            self._inside = False

    def apply(self, gradients: Sequence[Any], variables: Any = None) -> Any:
        """Average the gradients and hand them to the optimizer."""
        return self._apply(averaged(gradients, self._examples, self._group), variables)

    def metrics_result(self, model: Any) -> Any:
        """The metrics of all processes, except after each single step."""
        if self._inside:
            return self._metrics_result()
        own = [variable.value.clone() for variable in model.metrics_variables]
        sums = [value.clone() for value in own]
        for value in sums:
            distributed.all_reduce(value, group=self._group)
        try:
            _assign(model.metrics_variables, sums)
            return self._metrics_result()
        finally:
            _assign(model.metrics_variables, own)


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def averaged(gradients: Sequence[Any], examples: int, group: Any) -> list[Any]:
    """The gradients of the mean over all processes' examples, of those of this process's mean.

    Args:
        gradients: of the mean over this process's examples; None where there is none.
        examples: how many; of 0 the gradients, which are 0 / 0, count nothing.
        group: the process group.
    """
    result = list(gradients)
    dtypes = {gradient.dtype for gradient in gradients if gradient is not None}
    for dtype in sorted(dtypes, key=str):
        chosen = [i for i, g in enumerate(gradients) if g is not None and g.dtype == dtype]
        # A sum over examples may be beyond float16.
        wide = torch.promote_types(dtype, torch.float32)
        parts = [gradients[i].reshape(-1).to(wide) for i in chosen]
        flat = torch.cat([torch.ones_like(parts[0][:1]), *parts]) * examples
        if examples == 0:
            flat = torch.zeros_like(flat)
        distributed.all_reduce(flat, group=group)
        means = flat[1:] / flat[0].clamp(min=1)
        for i, own in zip(chosen, means.split([part.numel() for part in parts]), strict=True):
            result[i] = own.to(dtype).view_as(gradients[i])
    return result
