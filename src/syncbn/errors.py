"""The errors that syncbn raises, each of which says what was required, what was found, what to do.

SyncbnError
├── NotSynchronizableError   (RuntimeError)  synchronizing was asked for and cannot happen here
├── UnsupportedFeatureError  (ValueError)    an argument that cannot be served in this place
├── InputError               (ValueError)    arguments, data or settings that cannot be used
├── RepairError              (RuntimeError)  a repair of Keras that cannot tell, or be undone
└── WorkerError              (RuntimeError)  a worker is gone, late, or does something else
"""

from __future__ import annotations

__all__ = [
    "InputError",
    "NotSynchronizableError",
    "RepairError",
    "SyncbnError",
    "UnsupportedFeatureError",
    "WorkerError",
]


class SyncbnError(Exception):
    """Base of every error that syncbn raises itself."""

    # What AutoGraph asks for before it raises an error of a traced function as its own type;
    # otherwise users would meet an AutoGraph StagingError that no `except` of theirs expects.
    __init__ = Exception.__init__


class NotSynchronizableError(SyncbnError, RuntimeError):
    """Synchronizing was asked for and cannot happen in this place.

    The layer never falls back to the statistics of one replica: a model that trains on local
    statistics looks healthy and is wrong.
    """


class UnsupportedFeatureError(SyncbnError, ValueError):
    """An argument of batch normalization that cannot be served in this place."""


class InputError(SyncbnError, ValueError):
    """Arguments, data or settings that cannot be used; the command line ends with exit code 2."""


class RepairError(SyncbnError, RuntimeError):
    """A repair of Keras that cannot tell whether this Keras needs it, or cannot be undone."""


class WorkerError(SyncbnError, RuntimeError):
    """Another worker is gone, late, or does something else than this one; it says which."""
