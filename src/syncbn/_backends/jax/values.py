"""What is known of an array while Python runs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax

__all__ = ["is_concrete", "known_value"]


def is_concrete(array: Any) -> bool:
    """Whether the array has numbers now: not inside `jit` or a map; inside an eager `grad` it has.

    A gradient wraps the array in a tracer, below which the numbers are: `stop_gradient` unwraps it.
    """
    return not isinstance(lax.stop_gradient(array), jax.core.Tracer)


def known_value(tensor: Any) -> np.ndarray | None:
    """The numbers of an array; None of a tracer, and of one that other processes hold a part of."""
    array = lax.stop_gradient(tensor)
    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)
