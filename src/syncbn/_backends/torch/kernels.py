"""Which kernel makes the passes over the inputs: the one place that chooses."""

from __future__ import annotations

from typing import Any

import torch

from syncbn._backends.torch.composed import composed
from syncbn._backends.torch.cuda import cuda
from syncbn._backends.torch.native import native
from syncbn._backends.torch.scaling import Kernel

__all__ = ["kernel_for"]


def kernel_for(x: Any, weights: Any | None) -> Kernel:
    """The kernel for these inputs, by device, weights and whether torch compiles.

    What depends on this is local to a replica: the collectives are the same for every kernel.
    """
    if weights is not None or torch.compiler.is_compiling() or x.numel() == 0:
        return composed
    return _BY_DEVICE.get(x.device.type, composed)


_BY_DEVICE = {"cpu": native, "cuda": cuda}
