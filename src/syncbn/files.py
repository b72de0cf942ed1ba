"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syncbn.errors import InputError

__all__ = ["check_writable", "written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end, or nothing if that is not reached."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp allows the owner alone; results get the mode of any new file.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, what: str = "A report") -> None:
    """Make sure that `written_whole` can write there, before long work is done for it.

    Args:
        path: of the file.
        what: is to be written there, for the message.

    Raises:
        InputError: its folder is not there or cannot be written to, or it is a folder.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        # By the same call: a name that is too long for the file is none for the one before it.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        os.close(descriptor)
        Path(name).unlink()
        path.exists()
    except OSError as error:
        raise InputError(
            f"{what} requires a file that can be written, in a folder that exists. Received: "
            f"{str(path)!r} ({error.strerror or error}). Give another path."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
