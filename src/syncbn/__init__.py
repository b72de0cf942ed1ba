"""syncbn: synchronized batch normalization for Keras 3.

R replicas give what one device gives on the whole global batch. Public names are imported when
they are first used, so that importing the package imports no framework.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn import compat as compat
    from syncbn import tf_keras as tf_keras
    from syncbn.averaging import average_gradients
    from syncbn.checkpoints import load_weights
    from syncbn.conversion import ConversionPlan, convert, plan_conversion, revert, reverted
    from syncbn.errors import (
        InputError,
        NotSynchronizableError,
        RepairError,
        SyncbnError,
        UnsupportedFeatureError,
        WorkerError,
    )
    from syncbn.folding import fold, plan_folding
    from syncbn.layer import SyncBatchNormalization
    from syncbn.monitoring import SyncMonitor
    from syncbn.multi_worker import enable_multi_worker
    from syncbn.multi_worker.moving_statistics import average_moving_statistics
    from syncbn.portable import PortableCheckpoint
    from syncbn.ragged import distribute_dataset
    from syncbn.recalibration import recalibrate
    from syncbn.verification.verdict import Verdict
    from syncbn.verification.verifying import verify

__version__ = "0.1.0"

_MODULE_OF = {
    "ConversionPlan": "syncbn.conversion",
    "InputError": "syncbn.errors",
    "NotSynchronizableError": "syncbn.errors",
    "PortableCheckpoint": "syncbn.portable",
    "RepairError": "syncbn.errors",
    "SyncBatchNormalization": "syncbn.layer",
    "SyncMonitor": "syncbn.monitoring",
    "SyncbnError": "syncbn.errors",
    "UnsupportedFeatureError": "syncbn.errors",
    "Verdict": "syncbn.verification.verdict",
    "WorkerError": "syncbn.errors",
    "average_gradients": "syncbn.averaging",
    "average_moving_statistics": "syncbn.multi_worker.moving_statistics",
    "convert": "syncbn.conversion",
    "distribute_dataset": "syncbn.ragged",
    "enable_multi_worker": "syncbn.multi_worker",
    "fold": "syncbn.folding",
    "load_weights": "syncbn.checkpoints",
    "plan_conversion": "syncbn.conversion",
    "plan_folding": "syncbn.folding",
    "recalibrate": "syncbn.recalibration",
    "revert": "syncbn.conversion",
    "reverted": "syncbn.conversion",
    "verify": "syncbn.verification.verifying",
}

# Not in `__all__`: `from syncbn import *` needs no tf_keras.
_MODULES = ("compat", "tf_keras")

# Keras's names of them, which are those of their packages and of syncbn's extras.
_BACKENDS = ("tensorflow", "jax", "torch")

__all__ = [
    "ConversionPlan",
    "InputError",
    "NotSynchronizableError",
    "PortableCheckpoint",
    "RepairError",
    "SyncBatchNormalization",
    "SyncMonitor",
    "SyncbnError",
    "UnsupportedFeatureError",
    "Verdict",
    "WorkerError",
    "average_gradients",
    "average_moving_statistics",
    "convert",
    "distribute_dataset",
    "enable_multi_worker",
    "fold",
    "load_weights",
    "plan_conversion",
    "plan_folding",
    "recalibrate",
    "revert",
    "reverted",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"syncbn.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'syncbn' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in _BACKENDS:
            raise
        raise ModuleNotFoundError(
            f"syncbn.{name} requires the package {error.name}. Received: no such package. Install "
            f"it: pip install 'syncbn[{error.name}]'; or choose what Keras runs on by the "
            f"environment variable KERAS_BACKEND: {', '.join(_BACKENDS)}.",
            name=error.name,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *_MODULES})


# Keras loads a saved layer only if its class is registered, and registering it takes the class.
# Where Keras is there already, `import syncbn` is enough to load a saved model.
if hasattr(sys.modules.get("keras"), "layers"):
    importlib.import_module("syncbn.layer")
if hasattr(sys.modules.get("tf_keras"), "layers"):
    importlib.import_module("syncbn.tf_keras")
