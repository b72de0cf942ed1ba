"""What is known of a tensor while Python runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

__all__ = ["known_value"]


def known_value(tensor: Any) -> np.ndarray | None:
    """The numbers of a tensor: of an eager one or a constant; None of a tensor of a graph."""
    value: np.ndarray | None = tf.get_static_value(tensor)
    return value
