"""A repair of Keras: what it mends, how to tell whether this Keras needs it, what it replaces."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from syncbn.errors import RepairError

__all__ = ["MISSING", "Applied", "Patch", "Repair", "source_probe"]

MISSING = object()
"""What `Patch.replacement` is given where the owner has no such attribute of its own."""


@dataclass(frozen=True)
class Patch:
    """One attribute of a class or module of Keras, replaced.

    `replacement` takes the original (or `MISSING`, where a class only inherits it) and returns what
    stands in its place.
    """

    owner: Any
    attribute: str
    replacement: Callable[[Any], Any]

    def apply(self) -> Applied:
        """Put the replacement in; returns what takes it out again."""
        original = vars(self.owner).get(self.attribute, MISSING)
        replacement = self.replacement(original)
        setattr(self.owner, self.attribute, replacement)
        return Applied(self, original, replacement)


@dataclass(frozen=True)
class Applied:
    """A patch that is in place."""

    patch: Patch
    original: Any
    replacement: Any

    def undo(self) -> None:
        """Give the owner its original back.

        Raises:
            RepairError: somebody else has replaced the attribute since.
        """
        owner, attribute = self.patch.owner, self.patch.attribute
        if vars(owner).get(attribute) is not self.replacement:
            raise RepairError(
                f"Undoing requires that {owner.__name__}.{attribute} is what "
                "enable_multi_worker() put there. Received: another patch on top of it. Undo "
                "that one first."
            )
        if self.original is MISSING:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, self.original)


@dataclass(frozen=True)
class Repair:
    """A defect of Keras's training on replicas, and its repair.

    `module` has `is_needed() -> bool`, which raises RepairError where it cannot tell, and
    `patches() -> list[Patch]`. It is imported only when asked, so that the catalogue can be read
    where Keras is broken or absent.
    """

    name: str
    mends: str
    issue: str
    module: str

    def is_needed(self) -> bool:
        """Whether the Keras that is installed has the defect.

        Raises:
            RepairError: this Keras is neither of those that are known to have it nor repaired in
                the way that is known.
        """
        try:
            return bool(importlib.import_module(self.module).is_needed())
        except RepairError as error:
            raise RepairError(f"repair {self.name!r}: {error}") from error
        except ImportError as error:
            # What it would replace is not there.
            found = _cannot_tell(error.name or "module", f"none ({error})")
            raise RepairError(f"repair {self.name!r}: {found}") from error

    def patches(self) -> list[Patch]:
        """What it replaces, in order."""
        return list(importlib.import_module(self.module).patches())


def source_probe(function: str, *, broken: str, mended: str | None = None) -> bool:
    """Whether a function of Keras still reads as the defective one does.

    Args:
        function: its full name, as `keras.src.losses.loss.reduce_values`.
        broken: code that only the defective one has; white space does not matter.
        mended: code that only the mended one has.

    Raises:
        RepairError: there is no such function, or it has neither.
    """
    try:
        source = inspect.getsource(_resolve(function))
    except (AttributeError, ImportError, OSError, TypeError) as error:
        raise RepairError(_cannot_tell(function, f"there is none ({error})")) from error
    if _squeezed(broken) in _squeezed(source):
        return True
    if mended is not None and _squeezed(mended) in _squeezed(source):
        return False
    raise RepairError(_cannot_tell(function, "one that reads otherwise"))


def _cannot_tell(function: str, found: str) -> str:
    import keras

    return (
        f"telling whether Keras needs it requires a {function} that is known. Received: {found}, "
        f"in Keras {keras.__version__}. Use a Keras of the support table, or leave this repair out "
        "by enable_multi_worker(without=[…])."
    )


def _squeezed(code: str) -> str:
    return "".join(code.split())


def _resolve(name: str) -> Any:
    """The object of a full name: the longest importable module, then its attributes."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(f"no module named {parts[0]}")
