"""The Keras that the contract is run with: Keras 3, or by SYNCBN_KERAS=tf_keras that one.

Nothing else reads the variable. Both have layers of the same names, and what the tests need of
one that the other has differently is here.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

TF_KERAS = os.environ.get("SYNCBN_KERAS", "keras") == "tf_keras"


def __getattr__(name: str) -> Any:
    """`keras` and our layer for it, imported when asked for: what needs none stays fast."""
    if name == "keras":
        return importlib.import_module("tf_keras" if TF_KERAS else "keras")
    if name == "SyncBatchNormalization":
        module = importlib.import_module("syncbn.tf_keras" if TF_KERAS else "syncbn")
        return module.SyncBatchNormalization
    raise AttributeError(name)


def name_of(weight: Any) -> str:
    """The weight's name without that of its layer, with which tf_keras begins it."""
    return str(weight.name).rsplit("/", maxsplit=1)[-1].removesuffix(":0")


def framework_variable(weight: Any) -> Any:
    """What Keras 3 has a variable of its own around."""
    return weight if TF_KERAS else weight.value
