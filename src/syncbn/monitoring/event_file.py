"""Scalars in a file that TensorBoard reads, written by nothing but the standard library.

TensorBoard's own writers come with TensorFlow, or with a package that needs a web server; a machine
that trains needs neither. The format is TFRecord around protocol buffers, and old.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["EventFile"]

_NUMBERS = itertools.count()


class EventFile:
    """A file of events in a directory, which is made if it is not there.

    Raises:
        OSError: the directory cannot be made, or not be written to.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard takes what is named so, and reads the files of a directory in this order.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        self.path = directory / f"{name}.{os.getpid()}.{next(_NUMBERS)}.syncbn"
        self._file = self.path.open("wb")
        self._write(_text(3, b"brain.Event:2"))
        self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all values of a step, by their tags, in the file at once."""
        summary = b"".join(_value(tag, value) for tag, value in values.items())
        self._write(_varint(2 << 3) + _varint(step) + _text(5, summary))
        self._file.flush()

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(
            length
            + struct.pack("<I", _masked_crc(length))
            + event
            + struct.pack("<I", _masked_crc(event))
        )


def _value(tag: str, value: float) -> bytes:
    """A Summary.Value with its tag and a simple_value."""
    if math.isfinite(value):
        value = max(-_LARGEST, min(value, _LARGEST))
    return _text(1, _text(1, tag.encode()) + b"\x15" + struct.pack("<f", value))


_LARGEST = 3.4028234e38  # of float32


def _text(field: int, content: bytes) -> bytes:
    """A field of a message whose length is written before it."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _crc_table() -> list[int]:
    """CRC-32C (Castagnoli), reflected."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def _masked_crc(content: bytes) -> int:
    """TFRecord's checksum."""
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in content:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
