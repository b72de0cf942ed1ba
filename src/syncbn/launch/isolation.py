"""A network of their own for the workers of one machine, by Linux's network namespaces.

TensorFlow's worker servers listen on all interfaces without authentication, whatever TF_CONFIG
says: whoever reaches the port can run code in the process. In a namespace of their own the only
interface is a loopback that nothing else is on.

An ordinary user may make one together with a user namespace, unless the administrator or a
container forbids it. Inside, the user has the same number and the same rights to files, and
programs that change the user (sudo) do not work.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from pathlib import Path

__all__ = ["enter", "why_not"]

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_IFREQ = "16sH14x"  # struct ifreq as far as the flags: the interface's name, its flags


def why_not() -> str | None:
    """None if this process could enter a network of its own, else the reason.

    Tried in a child, as there is no way back, and as some kernels allow the first step alone.
    """
    if sys.platform != "linux":
        return f"{sys.platform} has no network namespaces"
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        return f"trying it failed: {error.strerror or error}"
    if child == 0:
        try:
            enter()
        except OSError as error:
            os.write(writer, (error.strerror or str(error)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as answer:
        reason = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        return f"trying it ended with status {status}"
    return f"the kernel refuses it: {reason}" if reason else None


def enter() -> None:
    """Move this process, which must have one thread, and its later children into a new network.

    Raises:
        OSError: the kernel does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    # Who may do it without a user namespace keeps the rights to the files of other users.
    try:
        _unshare(_CLONE_NEWNET)
    except PermissionError:
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _raise_loopback()


def _unshare(flags: int) -> None:
    # os.unshare is there from Python 3.12.
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _raise_loopback() -> None:
    """Switch the loopback on: a new network has it, but down."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack(_IFREQ, b"lo", 0)
        flags = struct.unpack(_IFREQ, fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack(_IFREQ, b"lo", flags | _IFF_UP))
