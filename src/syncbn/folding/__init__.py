"""Folding: batch normalization in inference becomes part of the layer before it."""

from __future__ import annotations

from syncbn.folding.folded import fold
from syncbn.folding.plan import Folded, FoldingPlan, Left, plan_folding

__all__ = ["Folded", "FoldingPlan", "Left", "fold", "plan_folding"]
