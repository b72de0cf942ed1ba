"""How `verify` sees the numbers of a step of torch's processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import torch
from torch import distributed

from syncbn._backends.classifier import part_of
from syncbn.averaging import average_gradients

__all__ = [
    "HAS_LOCAL_REPLICAS",
    "HAS_PROCESSES",
    "REPAIR",
    "dense",
    "devices",
    "fed",
    "has_short_products",
    "is_numeric",
    "is_repaired",
    "logs",
    "observe",
    "on_replicas",
    "repaired",
    "sharing",
    "sharing_of_processes",
    "values",
    "wait",
]

# Replicas are processes.
HAS_LOCAL_REPLICAS = False
# Replicas may be processes.
HAS_PROCESSES = True
# What syncbn has for the training by `fit`.
REPAIR = "syncbn.average_gradients(model)"


def is_numeric(value: Any) -> bool:
    """Whether it is a tensor of real numbers."""
    return isinstance(value, torch.Tensor) and not value.is_sparse and not value.is_complex()


def dense(gradient: Any) -> Any:
    """A gradient as a tensor; of an embedding it may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient


@torch.compiler.disable
def observe(tensors: list[Any], keep: Callable[[int, list[Any]], None]) -> None:
    """Call `keep` with the number of this process and the numbers."""
    keep(_rank(), [_array(tensor) for tensor in tensors])


def _array(tensor: Any) -> Any:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16; float32 holds each of its values.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextlib.contextmanager
def on_replicas(strategy: Any) -> Iterator[None]:
    """Where the model is made and trained; one process by itself is a group of one.

    So that a function that calls `average_gradients(model)` is the same on one device.
    """
    if strategy is not None or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def repaired(model: Any) -> Any:
    """The model with the gradients of all processes."""
    average_gradients(model)
    return model


def fed(batches: Any, strategy: Any, repair: bool) -> dict[str, Any]:
    """Arguments of `fit`: this process's part of each batch."""
    del repair
    arrays = {"x": batches.x, "y": batches.y, "sample_weight": batches.sample_weight}
    if strategy is None:
        return {**arrays, "batch_size": batches.size}
    return {"x": _Parts(batches)}


class _Parts(keras.utils.PyDataset):
    """This process's part of each batch, which may be empty."""

    def __init__(self, batches: Any) -> None:
        super().__init__()
        self._batches = batches

    def __len__(self) -> int:
        return int(self._batches.steps)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        start = index * self._batches.size
        size = self._batches.sizes[index]
        first, last = part_of(size, distributed.get_rank(), distributed.get_world_size())
        found = self._batches.rows(slice(start + first, start + last))
        return tuple(part for part in found if part is not None)


def logs(model: Any, of_step: dict[str, Any]) -> dict[str, Any]:
    """The metrics of all processes: those of a step are each process's own."""
    del of_step
    found: dict[str, Any] = model.get_metrics_result()
    return found


def wait(model: Any) -> None:
    """Until all numbers of the step are known."""
    del model  # they are


def values(variables: list[Any], strategy: Any) -> dict[int, list[Any]]:
    """The numbers of all variables in this process."""
    del strategy
    return {_rank(): [np.array(_array(variable.value)) for variable in variables]}


def has_short_products() -> bool:
    """Whether products or convolutions of float32 keep 10 bits, as cuDNN's do by default."""
    short = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return bool(torch.cuda.is_available() and short)


def is_repaired() -> bool:
    """What is repaired is a model."""
    return False


def sharing(strategy: Any) -> tuple[int, bool, bool, bool]:
    """Of one process."""
    del strategy
    return 1, False, False, True


def sharing_of_processes(replicas: int, repaired: bool) -> tuple[int, bool, bool, bool]:
    """Losses are means of a process's part; the optimizer's `apply` is given shares to sum."""
    del repaired
    return replicas, False, False, True


def devices(strategy: Any) -> list[str]:
    """Of this process."""
    del strategy
    return ["cuda" if torch.cuda.is_available() else "cpu"]
