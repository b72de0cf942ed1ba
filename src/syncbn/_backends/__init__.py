"""The frameworks behind the layer: the only packages that import one.

A backend is a module with one function,

    normalize_by_global_batch(inputs, gamma, beta, axis, epsilon, state) -> (outputs, Moments)

which normalizes by the moments of the concatenated batch of all replicas, differentiably, and
returns those moments for the moving statistics. Backends never import each other.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from syncbn.errors import NotSynchronizableError

__all__ = ["get"]

_BACKENDS = {"tensorflow": "syncbn._backends.tensorflow"}


def get(keras_backend: str) -> ModuleType:
    """The backend for Keras's own, by its name.

    Raises:
        NotSynchronizableError: Keras runs on a framework that has no backend here.
    """
    if keras_backend not in _BACKENDS:
        raise NotSynchronizableError(
            "Synchronized training requires Keras on one of the backends "
            f"{sorted(_BACKENDS)}. Received: keras.backend.backend()={keras_backend!r}. "
            "Set the environment variable KERAS_BACKEND=tensorflow before Keras is imported."
        )
    return importlib.import_module(_BACKENDS[keras_backend])
