"""Checkpoints of the past, of Keras 2, TensorFlow and torch, into models of Keras 3.

load.py         load_weights: read, match, say, and at the end assign
saved.py        what every reader gives
hdf5.py, store.py, graph.py, torch_state.py    a reader for each format; configs.py: what a
                configuration tells
slots.py        the layers of the model that have weights
places.py, matching.py    which layer is which
notes.py, report.py       what is said of it
"""

from syncbn.checkpoints.load import load_weights
from syncbn.checkpoints.report import CheckpointWarning, LoadReport, Restored

__all__ = ["CheckpointWarning", "LoadReport", "Restored", "load_weights"]
