"""torch's batch_norm, in both layouts of memory, and how fast its tensors are copied.

`torch.nn.SyncBatchNorm` refuses CPUs. On a GPU it is measured in a group of one process, where the
module itself would fall back to `batch_norm`: hence the function below it. That path has never run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from serve import CORES, Made, arrays, serve

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
EPSILON = 1e-3
MOMENTUM = 0.01  # of the new value


def batch_norm(x: Any, weight: Any, bias: Any, moving: tuple[Any, Any]) -> Any:
    """The local normalization."""
    return torch.nn.functional.batch_norm(x, *moving, weight, bias, True, MOMENTUM, EPSILON)


def synchronized(x: Any, weight: Any, bias: Any, moving: tuple[Any, Any]) -> Any:
    """What SyncBatchNorm does in a group of more than one process."""
    from torch.nn.modules._functions import SyncBatchNorm

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    return SyncBatchNorm.apply(x, weight, bias, *moving, EPSILON, MOMENTUM, group, 1)


VARIANTS: dict[str, tuple[Callable[..., Any], torch.memory_format]] = {
    "torch_contiguous": (batch_norm, torch.contiguous_format),
    "torch_channels_last": (batch_norm, torch.channels_last),
    "torch_sync": (synchronized, torch.channels_last),
}


def done() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make(variant: str, shape: list[int], replicas: int) -> Made:
    """A forward and backward on one device.

    Raises:
        ValueError: more than one replica.
    """
    if replicas != 1:
        raise ValueError(f"torch is measured on 1 replica. Received: {replicas}")
    if variant == "copy":
        return make_copy(shape)
    normalize, layout = VARIANTS[variant]
    if len(shape) != 4:
        layout = torch.contiguous_format
    x, dy = (as_tensor(array).contiguous(memory_format=layout) for array in arrays(shape, 1))
    x.requires_grad_()
    weight, bias = (
        torch.full(shape[-1:], value, device=DEVICE, requires_grad=True) for value in (1.0, 0.0)
    )
    moving = torch.zeros(shape[-1], device=DEVICE), torch.ones(shape[-1], device=DEVICE)

    def run() -> Any:
        y = normalize(x, weight, bias, moving)
        gradients = torch.autograd.grad(y, [x, weight, bias], dy)
        done()
        return y, gradients

    def results() -> list[np.ndarray]:
        y, (dx, dweight, dbias) = run()
        return [channels_last(y), channels_last(dx), dweight.cpu().numpy(), dbias.cpu().numpy()]

    return Made(run, results)


def make_copy(shape: list[int]) -> Made:
    """One tensor of the shape copied to another: one read and one write."""
    source = as_tensor(arrays(shape, 1)[0])
    target = torch.empty_like(source)

    def run() -> Any:
        target.copy_(source)
        done()

    return Made(run, list)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """With the channels on axis 1, as torch has them."""
    tensor = torch.from_numpy(array).to(DEVICE)
    return tensor.permute(0, 3, 1, 2) if array.ndim == 4 else tensor


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    """As an array with the channels on the last axis."""
    array: np.ndarray = tensor.detach().cpu().numpy()
    return np.moveaxis(array, 1, -1)


if __name__ == "__main__":
    torch.set_num_threads(CORES)
    serve(
        make,
        versions={"torch": torch.__version__},
        threads=torch.get_num_threads(),
        accelerator="cuda" if torch.cuda.is_available() else None,
    )
