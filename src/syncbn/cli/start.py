"""Starting TensorFlow for a command, or saying what is missing."""

from __future__ import annotations

import os

from syncbn.cli.quiet import without_start_notices
from syncbn.errors import InputError

__all__ = ["start_tensorflow"]


def start_tensorflow(command: str, extras: str) -> None:
    """Import it quietly.

    Args:
        command: that needs it.
        extras: what of syncbn to install for that command.

    Raises:
        InputError: it is not there, or Keras is to run on something else.
    """
    if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
        raise InputError(
            f"syncbn {command} requires Keras on TensorFlow. Received: the environment variable "
            f"KERAS_BACKEND={os.environ['KERAS_BACKEND']}. Unset it."
        )
    # TensorFlow's notices about its own build would stand between the user and the table.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with without_start_notices():
            import tensorflow  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"syncbn {command} requires TensorFlow. Received: no such package. Install it: "
            f"pip install 'syncbn[{extras}]'."
        ) from error
