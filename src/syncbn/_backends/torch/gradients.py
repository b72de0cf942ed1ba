"""`fit` by several processes of `torch.distributed` as one training: Keras 3.15 gives none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch import distributed

from syncbn._backends.torch.collectives import Replicas, moments_dtype, replicas_of
from syncbn.errors import InputError, NotSynchronizableError, WorkerError

__all__ = ["average_gradients"]


def average_gradients(model: Any, process_group: Any) -> None:
    """What `syncbn.average_gradients` says."""
    replicas = _check(model, process_group)
    before = getattr(model, _MARK, None)
    if before is not None:
        if before.optimizer is model.optimizer:
            return
        before.undo()
    step = _Step(replicas, model)
    for variable in [*model.weights, *model.optimizer.variables]:
        step.broadcast(variable.value.data)
    setattr(model, _MARK, step)


_MARK = "_syncbn_averages_gradients"


def _check(model: Any, process_group: Any) -> Replicas:
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
    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        if reduction not in ("sum_over_batch_size", "mean"):
            raise InputError(
                "average_gradients requires losses that are means over the examples. Received: "
                f"{type(loss).__name__}(reduction={reduction!r}). Take "
                'reduction="sum_over_batch_size", or DistributedDataParallel in a loop that '
                "divides by what the loss is to be divided by."
            )
    return replicas_of(process_group)


class _Step:
    """One step of training, between what Keras's trainer does before and after it."""

    # What of the model and of its optimizer is replaced, by the method of that name here.
    _OF_MODEL = ("train_step", "test_step", "compute_loss", "get_metrics_result")
    _OF_OPTIMIZER = ("scale_loss", "apply")

    def __init__(self, replicas: Replicas, model: Any) -> None:
        self._replicas = replicas
        self._model = model
        self.optimizer = model.optimizer
        self._examples, self._share = 0, 1.0
        self._inside = False
        self._keras: dict[str, Any] = {}
        for owner, names in ((model, self._OF_MODEL), (model.optimizer, self._OF_OPTIMIZER)):
            for name in names:
                self._keras[name] = getattr(owner, name)
                setattr(owner, name, getattr(self, f"_{name}"))

    def undo(self) -> None:
        """Give the model and its optimizer back what they had."""
        for owner, names in (
            (self._model, self._OF_MODEL),
            (self.optimizer, self._OF_OPTIMIZER),
        ):
            for name in names:
                delattr(owner, name)

    def broadcast(self, tensor: Any) -> None:
        """Make it that of the first process."""
        if self._replicas.size > 1:
            group = self._replicas.group
            distributed.broadcast(tensor, distributed.get_global_rank(group, 0), group=group)

    def _train_step(self, data: Any) -> Any:
        if self._model.optimizer is not self.optimizer:
            raise InputError(
                "average_gradients requires the optimizer that it was given with. Received: a "
                "model that has been compiled anew since. Call syncbn.average_gradients(model) "
                "after model.compile(...)."
            )
        device = self._count(data)
        total = self._meet(_STEP, float(self._examples), device)
        self._share = self._examples / max(total, 1.0)
        return self._within("train_step", data)

    def _test_step(self, data: Any) -> Any:
        self._count(data)
        return self._within("test_step", data)

    def _count(self, data: Any) -> Any:
        """Note the number of examples; the device that they are on."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        first = next(part for part in keras.tree.flatten(x) if part is not None)
        self._examples = first.shape[0]
        return first.device

    def _within(self, name: str, data: Any) -> Any:
        self._inside = True
        try:
            return self._keras[name](data)
        finally:
            self._inside = False

    def _compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, *rest: Any, **named: Any
    ) -> Any:
        outputs = keras.tree.flatten(y_pred)
        if any(getattr(output, "_keras_mask", None) is not None for output in outputs):
            raise InputError(
                "average_gradients requires outputs without a mask: Keras divides their loss by "
                "the elements that are not masked, of which processes hold different numbers. "
                "Received: an output with a mask. Take DistributedDataParallel in a loop that "
                "divides by the elements of all processes."
            )
        if self._examples == 0:
            # A mean over nothing is NaN. Every weight is to have a gradient all the same.
            return sum([output.sum() * 0 for output in outputs] + list(self._model.losses))
        return self._keras["compute_loss"](x, y, y_pred, *rest, **named)

    def _scale_loss(self, loss: Any) -> Any:
        """This process's part of the loss of all."""
        return self._keras["scale_loss"](loss) * self._share

    def _apply(self, gradients: Sequence[Any], variables: Any = None) -> Any:
        """Sum the gradients and hand them to the optimizer."""
        return self._keras["apply"](self._summed(gradients), variables)

    def _get_metrics_result(self) -> Any:
        """The metrics of all processes, except after each single step."""
        if self._inside:
            return self._keras["get_metrics_result"]()
        variables = self._model.metrics_variables
        own = [variable.value.clone() for variable in variables]
        if own:
            self._meet(_RESULT, 0.0, own[0].device)
        try:
            _assign(variables, self._summed(own))
            # Some are views of the variables, which get their own values back.
            return keras.tree.map_structure(
                lambda value: value.clone() if isinstance(value, torch.Tensor) else value,
                self._keras["get_metrics_result"](),
            )
        finally:
            _assign(variables, own)

    @torch.compiler.disable
    def _meet(self, what: float, number: float, device: Any) -> float:
        """The sum of the processes' numbers, if all of them are at the same point.

        Raises:
            WorkerError: one takes a further step where another has ended its data.
        """
        vector = torch.tensor([number, what], dtype=moments_dtype(device), device=device)
        self._all_reduce(vector)
        total, point = vector.tolist()
        if point != what * self._replicas.size:
            raise WorkerError(
                "average_gradients requires as many batches on every process. Received: in the "
                f"process of rank {distributed.get_rank()} "
                f"{'a further batch' if what == _STEP else 'the end of the data'}, where another "
                f"process has {'no more' if what == _STEP else 'a further batch'}. Give all of "
                "them the same number, by steps_per_epoch or by batches without examples."
            )
        return float(total)

    def _summed(self, tensors: Sequence[Any]) -> list[Any]:
        """The sums over the processes, None where there is none; one all-reduce a dtype."""
        result = list(tensors)
        for dtype in sorted({tensor.dtype for tensor in tensors if tensor is not None}, key=str):
            chosen = [i for i, t in enumerate(tensors) if t is not None and t.dtype == dtype]
            parts = [tensors[i].reshape(-1) for i in chosen]
            flat = torch.cat(parts)
            self._all_reduce(flat)
            for i, own in zip(chosen, flat.split([part.numel() for part in parts]), strict=True):
                result[i] = own.view_as(tensors[i])
        return result

    def _all_reduce(self, vector: Any) -> None:
        if self._replicas.size == 1:
            return
        if torch.compiler.is_compiling():
            distributed.all_reduce(vector, group=self._replicas.group)
            return
        try:
            distributed.all_reduce(vector, group=self._replicas.group)
        except RuntimeError as error:
            raise WorkerError(
                f"average_gradients requires that all {self._replicas.size} processes take the "
                f"same steps. Received in the process of rank {distributed.get_rank()}, from "
                f"torch.distributed: {error} Look for a process that has ended. How long to wait "
                "is `timeout=` of init_process_group."
            ) from error


# Points at which processes meet, so far apart that no number of processes takes one for another.
_STEP, _RESULT = 1.0, 1e6


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
