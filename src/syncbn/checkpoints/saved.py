"""What every reader of a checkpoint gives, whatever the format: layers with their arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Saved", "SavedLayer", "base_and_number", "is_normalization", "leaf_name", "snake_case"]

# What Keras, old and new, calls the two classes where it names a layer by its class.
NORMALIZATIONS = frozenset({"batch_normalization", "sync_batch_normalization"})

# Keras 2's names of weights that have another in Keras 3.
_NEW_NAMES = {"depthwise_kernel": "kernel"}


class SavedLayer(NamedTuple):
    """One layer that has arrays of its own, as a file has it."""

    path: str
    """Where it lies in the file, as messages name it."""
    arrays: Mapping[str, np.ndarray]
    """By the weight's name, or by its number in the order of the layer, as the file has them."""
    name: str | None = None
    """The layer's name in the program that saved it."""
    class_name: str | None = None
    """Its class, where the file says it: `SyncBatchNormalization`, or in snake case."""
    config: Mapping[str, Any] | None = None
    """Its configuration, where the file has one."""
    address: tuple[str, ...] | None = None
    """Its place in the tree of the model, by the rules of the format."""


class Saved(NamedTuple):
    """A checkpoint, read."""

    format: str
    layers: tuple[SavedLayer, ...]
    ordered: bool
    """Whether the layers come in the order of the model."""
    keras_version: str | None = None
    """The Keras that wrote it, where the file says so."""
    left_out: tuple[str, ...] = ()
    """What is in the file and not of the model: slots of the optimizer, metrics."""
    has_config: bool = False
    classes: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """All batch normalizations of the configuration: class name and configuration."""


def leaf_name(name: str) -> str:
    """The weight's own name, as Keras 3 has it: `gamma` of `net/block/bn/gamma:0`."""
    leaf = name.rsplit("/", 1)[-1].split(":")[0]
    return _NEW_NAMES.get(leaf, leaf)


def base_and_number(name: str) -> tuple[str, int]:
    """`("conv2d", 12)` of `conv2d_12`; the first of a session has no number and counts as 0."""
    match = re.fullmatch(r"(.+?)_(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 0)


def is_normalization(base: str | None) -> bool:
    """Whether a class, as a file has it, is one of the two batch normalizations."""
    return base is not None and snake_case(base) in NORMALIZATIONS


def snake_case(name: str) -> str:
    """`batch_normalization` of `BatchNormalization`, as Keras writes names of classes."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
