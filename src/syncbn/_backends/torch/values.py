"""What is known of a tensor while Python runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["known_value"]


def known_value(tensor: Any) -> np.ndarray | None:
    """The numbers of a tensor; None while torch compiles, where there are none yet.

    Of a tensor on another device None too: to look at it would wait for the device.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return None
    value: np.ndarray = tensor.detach().numpy()
    return value
