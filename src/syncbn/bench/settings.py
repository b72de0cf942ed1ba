"""What the short benchmark is asked to do, and whether it can be done."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from syncbn.errors import InputError

__all__ = ["SHAPES", "BenchSettings", "parse_shape"]

SHAPES = ((16, 56, 56, 64), (16, 14, 14, 256), (64, 128))

# A gigabyte in float32; a step holds about eight such tensors on every replica.
_MOST_ELEMENTS = 2**28
_LIMITS = {"replicas": (2, 64), "rounds": (6, 10_000), "batch": (1, 4096), "image": (8, 512)}


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """One short benchmark.

    Attributes:
        shapes: of the layer's inputs on each replica, batch first and channels last.
        replicas: None for all visible GPUs, or two virtual CPU devices without a second GPU.
        rounds: in which the variants take turns.
        batch: examples of the training step on each replica.
        image: height and width of its images, in pixels.
        output: file for the figures as JSON, or None.
    """

    shapes: tuple[tuple[int, ...], ...] = SHAPES
    replicas: int | None = None
    rounds: int = 30
    batch: int = 8
    image: int = 64
    output: Path | None = None

    def check(self) -> None:
        """Raise an InputError for the first value that cannot be meant."""
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(
                    f"--{name} must be at least {least} and at most {most}. Received: {value}. "
                    "Give another number."
                )
        for shape in self.shapes:
            if math.prod(shape) > _MOST_ELEMENTS:
                raise InputError(
                    f"--shape must have at most {_MOST_ELEMENTS} elements. Received: "
                    f"{','.join(map(str, shape))} with {math.prod(shape)}. Give a smaller one."
                )
        if self.output is not None:
            _check_file(self.output)


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape from whole numbers by commas.

    Raises:
        InputError: it is none of batch normalization.
    """
    parts = text.replace(" ", "").split(",")
    if not 2 <= len(parts) <= 5 or not all(p.isascii() and p.isdigit() and int(p) for p in parts):
        raise InputError(
            "--shape must be 2 to 5 positive whole numbers by commas, batch first and channels "
            f"last. Received: {text!r}. Give for example 16,56,56,64."
        )
    return tuple(map(int, parts))


def _check_file(path: Path) -> None:
    """Before a minute is spent on it."""
    problem = None
    if path.is_dir():
        problem = "is a folder"
    elif not path.parent.is_dir():
        problem = "is in no folder that exists"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "may not be written"
    if problem:
        raise InputError(
            f"--output must be a file that can be written. Received: {str(path)!r}, which "
            f"{problem}. Give another."
        )
