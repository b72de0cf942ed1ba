"""Derivatives by differences, to compare with."""

from __future__ import annotations

import numpy as np


def central_differences(function, array, step=1e-5):
    gradient = np.zeros_like(array)
    for index in np.ndindex(*array.shape):
        values = []
        for sign in (1, -1):
            moved = array.copy()
            moved[index] += sign * step
            values.append(function(moved))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient
