"""The frameworks behind the layer: the only packages that import one.

A backend is a module with two functions, whose arguments `interface.py` defines:

    normalize(batch, scheme, affine) -> (outputs, Moments)
        normalizes by the moments of the concatenated batch of all replicas, differentiably, and
        returns those moments for the moving statistics;
    known_value(tensor) -> ndarray | None
        the numbers of a tensor, where they are known now.

The modules `loop` and `replicas` of each are for the jobs that syncbn runs itself; `classifier.py`
says what they offer. Backends never import each other.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from syncbn.errors import NotSynchronizableError

__all__ = ["get"]

_BACKENDS = {name: f"syncbn._backends.{name}" for name in ("jax", "tensorflow", "torch")}


def get(keras_backend: str, module: str = "") -> ModuleType:
    """The backend for Keras's own, by its name, or the module of that name within it.

    Raises:
        NotSynchronizableError: Keras runs on a framework that has no backend here.
    """
    if keras_backend not in _BACKENDS:
        raise NotSynchronizableError(
            "Synchronized training requires Keras on one of the backends "
            f"{sorted(_BACKENDS)}. Received: keras.backend.backend()={keras_backend!r}. "
            "Set the environment variable KERAS_BACKEND to one of them before Keras is imported."
        )
    name = f"{_BACKENDS[keras_backend]}.{module}".rstrip(".")
    # Looked up before it is imported: torch.compile cannot trace an import.
    return sys.modules[name] if name in sys.modules else importlib.import_module(name)
