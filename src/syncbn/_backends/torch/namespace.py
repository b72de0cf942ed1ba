"""torch under the names that syncbn's pure maths calls, which takes numbers where torch does not.

Not `keras.ops`: it adds its own casts to every call.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["xp"]


def _maximum(tensor: Any, other: Any) -> Any:
    if isinstance(other, torch.Tensor):
        return torch.maximum(tensor, other)
    return torch.clamp(tensor, min=other)


xp = SimpleNamespace(
    concatenate=torch.cat,
    maximum=_maximum,
    minimum=torch.minimum,
    sum=torch.sum,
    where=torch.where,
    zeros_like=torch.zeros_like,
)
