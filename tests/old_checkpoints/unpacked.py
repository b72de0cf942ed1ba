"""The archives of files that old versions wrote."""

from __future__ import annotations

import tarfile
from pathlib import Path


def unpack(version: str, folder: Path) -> None:
    """Put the files of a version into the folder."""
    # The first Pythons 3.11 do not know of filters.
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(Path(__file__).parent / f"{version}.tar.xz") as archive:
        archive.extractall(folder, **safely)
