"""`fit` by several processes of `torch.distributed` as one training: Keras 3.15 gives none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch import distributed

from syncbn.errors import InputError, NotSynchronizableError

__all__ = ["average_gradients"]


def average_gradients(model: Any, process_group: Any = None) -> None:
    """Make `fit` and `evaluate` of all processes one training, by the mean over their examples.

    In every step the gradient is that of `Σ_r n_r · loss_r / Σ_r n_r`, where loss_r is the mean
    over the n_r examples of process r: of the mean over the examples of all processes, also where
    they hold different numbers, or none. Each loss is scaled before the backward pass, in which
    synchronized layers add up what the processes' losses say. One all-reduce a step for the number
    of examples, and one for all gradients of a dtype. The weights start as those of the first
    process. Logs at the end of an epoch and of `evaluate` are
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
    step = _Step(process_group, model)
    model.train_step = step.train_step
    model.get_metrics_result = step.metrics_result
    model.optimizer.scale_loss = step.scale_loss
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

    def __init__(self, group: Any, model: Any) -> None:
        self._group = group
        self._metrics = model
        self._train_step = model.train_step
        self._metrics_result = model.get_metrics_result
        self._scale_loss = model.optimizer.scale_loss
        self._apply = model.optimizer.apply
        self._share: Any = None
        self._inside = False

    def train_step(self, data: Any) -> Any:
        """Keras's own, which calls the next two."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        first = next(part for part in keras.tree.flatten(x) if part is not None)
        own = torch.full((), first.shape[0], dtype=torch.float32, device=first.device)
        total = own.clone()
        distributed.all_reduce(total, group=self._group)
        self._share = own / total.clamp(min=1)
        self._inside = True
        try:
            return self._train_step(data)
        finally:
            self._inside = False

    def scale_loss(self, loss: Any) -> Any:
        """This process's part of the loss of all."""
        return self._scale_loss(loss) * self._share

    def apply(self, gradients: Sequence[Any], variables: Any = None) -> Any:
        """Sum the gradients and hand them to the optimizer."""
        return self._apply(summed(gradients, self._group), variables)

    def metrics_result(self) -> Any:
        """The metrics of all processes, except after each single step."""
        if self._inside:
            return self._metrics_result()
        variables = self._metrics.metrics_variables
        own = [variable.value.clone() for variable in variables]
        try:
            _assign(variables, summed(own, self._group))
            return self._metrics_result()
        finally:
            _assign(variables, own)


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def summed(tensors: Sequence[Any], group: Any) -> list[Any]:
    """The sums over the processes, None where there is none; one all-reduce a dtype."""
    result = list(tensors)
    for dtype in sorted({tensor.dtype for tensor in tensors if tensor is not None}, key=str):
        chosen = [i for i, t in enumerate(tensors) if t is not None and t.dtype == dtype]
        parts = [tensors[i].reshape(-1) for i in chosen]
        flat = torch.cat(parts)
        distributed.all_reduce(flat, group=group)
        for i, own in zip(chosen, flat.split([part.numel() for part in parts]), strict=True):
            result[i] = own.view_as(tensors[i])
    return result
