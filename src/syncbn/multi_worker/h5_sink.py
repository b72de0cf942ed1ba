"""A file for HDF5 to write to, which takes what the disk does not.

HDF5 cannot be told that a disk is full: h5py leaves the file open within the library, and the
process dies by a segmentation fault when it ends. Here HDF5 always succeeds, and whoever made the
file asks for the error afterwards.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

__all__ = ["Sink"]


class Sink(io.BytesIO):
    """A BytesIO, which h5py and Keras take for a file in memory, whose bytes are on disk.

    `error`: of the first write that failed; from there on nothing is kept.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file = path.open("w+b", buffering=0)
        self._end = 0
        self._at = 0
        self.error: OSError | None = None

    def __str__(self) -> str:
        return str(self._path)  # Keras looks at its ending

    def write(self, data: Any) -> int:
        """All of it, or as if."""
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                done = 0
                while done < len(view):
                    done += os.pwrite(self._file.fileno(), view[done:], self._at + done)
            except OSError as error:
                self.error = error
        self._at += len(view)
        self._end = max(self._end, self._at)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """What was written there; zeros in place of what was not kept."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._end - self._at))
        found = os.pread(self._file.fileno(), wanted, self._at)
        view[:wanted] = found.ljust(wanted, b"\0")
        self._at += wanted
        return wanted

    def read(self, size: int | None = -1) -> bytes:
        """As `readinto`."""
        rest = max(0, self._end - self._at)
        buffer = bytearray(rest if size is None or size < 0 else min(size, rest))
        self.readinto(buffer)
        return bytes(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Where the next read or write is."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        return self._at

    def tell(self) -> int:
        """Where the next read or write is."""
        return self._at

    def truncate(self, size: int | None = None) -> int:
        """The length, of the file too."""
        self._end = self._at if size is None else size
        if self.error is None:
            try:
                os.ftruncate(self._file.fileno(), self._end)
            except OSError as error:
                self.error = error
        return self._end

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self) -> None:
        """The file; the error stays to be asked for."""
        self._file.close()
        super().close()
