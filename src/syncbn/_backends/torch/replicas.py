"""Processes for jobs that syncbn runs itself, such as `syncbn train`."""

from __future__ import annotations

import atexit
import functools
import os
from typing import Any

import torch
from torch import distributed

__all__ = ["prepare", "strategy_over"]


def prepare(devices: int, precision: str) -> None:
    """Nothing: replicas are processes, each with a device of its own, and there is every dtype."""
    del devices, precision


@functools.cache
def strategy_over(replicas: int, by_processes: bool) -> Any:
    """What a loop is given: the process group of torch's env:// variables; None for one process."""
    if not by_processes:
        return None
    if not distributed.is_initialized():
        # Of fewer GPUs than processes NCCL makes nothing; gloo takes tensors of theirs as well.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", replicas))
        one_each = torch.cuda.device_count() >= here
        if one_each:
            # Else all of them would meet on the first one.
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if one_each else "gloo")
        atexit.register(distributed.destroy_process_group)
    return distributed.group.WORLD
