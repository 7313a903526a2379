"""Opening of files that data name: regular files only, so that no FIFO, device or socket is waited for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes; OSError for anything else, without waiting for another process.

    O_NONBLOCK opens a FIFO at once, whether anybody writes to it or not; it changes nothing for a regular file.
    """
    check_regular(path)  # before it is opened: to open some devices is to start them
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | Path) -> None:
    """Raise OSError for a path that is not there, or is no regular file, for readers that open paths themselves."""
    _check_mode(os.stat(path).st_mode, path)


def _check_mode(mode: int, path: str | Path) -> None:
    if stat.S_ISREG(mode):
        return
    kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, f"it is {kind}, not a regular file", str(path))
