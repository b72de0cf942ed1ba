"""What a user calls on a model to train, evaluate or predict; in Keras's own words."""

from __future__ import annotations

__all__ = ["OPERATIONS"]

OPERATIONS = (
    "fit",
    "evaluate",
    "predict",
    "train_on_batch",
    "test_on_batch",
    "predict_on_batch",
)
