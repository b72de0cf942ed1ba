"""Starting a framework for a command, or saying what is missing."""

from __future__ import annotations

import importlib
import os

from syncbn.cli.quiet import without_start_notices
from syncbn.errors import InputError

__all__ = ["FRAMEWORKS", "start_framework"]

FRAMEWORKS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}


def start_framework(command: str, backend: str, extras: str = "") -> None:
    """Have Keras run on it, and import it quietly.

    Args:
        command: that needs it.
        backend: Keras's name of it.
        extras: what else of syncbn to install for that command, by commas.

    Raises:
        InputError: it is not there, or Keras is to run on something else.
    """
    name = FRAMEWORKS[backend]
    found = os.environ.get("KERAS_BACKEND") or backend
    if found != backend:
        raise InputError(
            f"syncbn {command} requires Keras on {name}. Received: the environment variable "
            f"KERAS_BACKEND={found}. Unset it."
        )
    os.environ["KERAS_BACKEND"] = backend
    # TensorFlow's notices about its own build would stand between the user and the table.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # And torch's about the names of hosts, of which a network of the workers' own has none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with without_start_notices():
            importlib.import_module(backend)
    except ImportError as error:
        extras = ",".join(filter(None, (backend, extras)))
        raise InputError(
            f"syncbn {command} requires {name}. Received: no such package. Install it: "
            f"pip install 'syncbn[{extras}]'."
        ) from error
