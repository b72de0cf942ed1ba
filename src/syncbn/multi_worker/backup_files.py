"""A backup on disk: weights and epoch written as one, and known again when damaged.

Keras writes the weights, then the epoch; a worker killed in between restores the weights of one
epoch as those of another. Here the file of the epoch also names the file of the weights that it
belongs to, and replacing it is the one moment at which the new backup takes effect:

1. the weights are written to a file of a new name;
2. the epoch, with that name, replaces `training_metadata.json`;
3. the weights replace `latest.weights.h5`, where Keras reads them.

Killed before 2, the old pair stands. Killed after it, the new one does: whoever reads follows the
name. The previous backup (`double_checkpoint=True`) takes its place in the same way. Reading
changes no file, so that a backup that cannot be restored is left as it was found.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Backup", "DamageError", "Files", "Pair", "check_folder", "free_bytes", "read", "write"]

ENDING = ".weights.h5"
FULL = {errno.ENOSPC, errno.EDQUOT}


class DamageError(Exception):
    """What was found in place of a backup, in words; whoever asked for it says what to do."""


@dataclass(frozen=True)
class Pair:
    """The two files of one backup."""

    weights: Path
    metadata: Path

    def is_there(self) -> bool:
        """Whether there is anything of it."""
        return self.weights.exists() or self.metadata.exists()


@dataclass(frozen=True)
class Files:
    """The folder of a backup: the latest and the one before."""

    folder: Path
    latest: Pair
    previous: Pair

    def is_there(self) -> bool:
        """Whether there is anything of either; False also where one may not look."""
        with contextlib.suppress(OSError):
            return self.latest.is_there() or self.previous.is_there()
        return False

    @classmethod
    def of(cls, callback: Any) -> Files:
        """Those of a `BackupAndRestore`."""
        latest = Pair(Path(callback._weights_path), Path(callback._training_metadata_path))
        previous = Pair(
            Path(callback._prev_weights_path), Path(callback._prev_training_metadata_path)
        )
        return cls(Path(callback.backup_dir), latest, previous)


@dataclass(frozen=True)
class Backup:
    """A backup that is whole, as far as can be told without a model."""

    weights: Path
    content: dict[str, Any]


def read(pair: Pair) -> Backup | None:
    """The backup of a pair, or None if there is nothing.

    Raises:
        DamageError: there is something, and it is not a backup.
    """
    if not pair.is_there():
        return None
    if not pair.metadata.exists():
        raise DamageError(f"{pair.weights} without {pair.metadata.name}, which says of what epoch")
    text = pair.metadata.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DamageError(
            f"{pair.metadata}, {len(text)} bytes that are not JSON ({error})"
        ) from error
    epoch = content.get("epoch") if isinstance(content, dict) else None
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise DamageError(f"{pair.metadata} with {text[:80]!r}, which names no epoch")
    weights = _named(pair.metadata) or pair.weights
    if not weights.exists():
        raise DamageError(f"{pair.metadata} without {pair.weights.name}, whose epoch it names")
    _check_sum(weights, content, pair.metadata.name)
    return Backup(weights, content)


def _check_sum(weights: Path, content: dict[str, Any], name: str) -> None:
    length = weights.stat().st_size
    if content.get("bytes", length) != length:
        raise DamageError(f"{weights} of {length} bytes, where {name} says {content['bytes']}")
    if "sha256" in content and _sum(weights) != content["sha256"]:
        raise DamageError(f"{weights} whose SHA-256 is not the one that {name} says")


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(metadata: Path) -> Path | None:
    """The weights that a metadata file names, while they have not taken their place yet."""
    try:
        content = json.loads(metadata.read_bytes())
        named = content.get("weights")
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong with it is for `read` to say
    if not isinstance(named, str) or Path(named).name != named:
        return None
    path = metadata.with_name(named)
    return path if path.exists() else None


def write(
    files: Files,
    save: Callable[[Path], None],
    content: dict[str, Any],
    *,
    needed: int,
    rotate: bool,
) -> None:
    """Write a backup; until it is whole the one before stands, and no half of it stays behind.

    Args:
        files: where.
        save: writes the weights to a path.
        content: what belongs into the metadata, beside what is said of the weights.
        needed: bytes that the weights have, at least.
        rotate: whether the latest becomes the previous one.

    Raises:
        OSError: the disk is full, say.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    complete(files)  # before the room is measured: half a backup may be what fills the disk
    free = free_bytes(files.folder)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    new = files.folder / f"new-{uuid.uuid4().hex}{ENDING}"
    beside = _beside(files.latest.metadata)
    try:
        save(new)
        _sync(new)
        size = new.stat().st_size
        said = {"weights": new.name, "bytes": size, "sha256": _sum(new)}
        _write(beside, content | said)
        if rotate:
            _rotate(files)
    except BaseException:
        for path in (beside, new):
            path.unlink(missing_ok=True)
        raise
    beside.replace(files.latest.metadata)
    new.replace(files.latest.weights)


def complete(files: Files) -> None:
    """Finish a backup that was interrupted after it took effect; drop one that was before."""
    if not files.folder.is_dir():
        return
    for pair in (files.latest, files.previous):
        named = _named(pair.metadata)
        if named is not None:
            named.replace(pair.weights)
    for path in files.folder.glob(f"new-*{ENDING}"):
        path.unlink(missing_ok=True)  # its bytes may be the latest backup's too


def _rotate(files: Files) -> None:
    """The latest backup also as the previous one, without a second copy of its bytes."""
    try:
        content = json.loads(files.latest.metadata.read_bytes())
    except (FileNotFoundError, ValueError):
        return  # the first one; or damaged, and not to replace a good one
    aside = files.folder / f"new-{uuid.uuid4().hex}{ENDING}"
    beside = _beside(files.previous.metadata)
    try:
        try:
            os.link(files.latest.weights, aside)
        except FileNotFoundError:
            return
        except OSError:  # a file system without links
            shutil.copyfile(files.latest.weights, aside)
        _write(beside, content | {"weights": aside.name})
    except BaseException:
        for path in (beside, aside):
            path.unlink(missing_ok=True)
        raise
    beside.replace(files.previous.metadata)
    aside.replace(files.previous.weights)
    aside.unlink(missing_ok=True)  # a rename does nothing where both are one file already


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))
    _sync(path)


def _sync(path: Path) -> None:
    """On disk, before a rename lets anyone rely on it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def check_folder(folder: Path) -> str | None:
    """Why no backup can be written there, or None. A full disk is not a reason: that passes."""
    probe = folder / f"new-{uuid.uuid4().hex}{ENDING}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno not in FULL:
            return f"{type(error).__name__}: {error.strerror}"
    return None


def free_bytes(folder: Path) -> int | None:
    """What is free on the folder's disk, or None where the file system does not say."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    usage = shutil.disk_usage(there) if there is not None else None
    return usage.free if usage is not None and usage.total else None
