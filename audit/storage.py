"""Atomic writing of files and folders, and safe opening of regular files."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import MmauditError
from .parsing import Shape, check_shape, parse_json
from .workers import ProcessId, this_process

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes; raise OSError for anything else, without waiting for another process.

    O_NONBLOCK opens a FIFO without waiting for a writer; it has no effect on a regular file.
    """
    check_regular(path)  # before opening, since opening some devices starts them
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | Path) -> None:
    """Raise OSError unless a path is a regular file; for readers that open paths themselves."""
    _check_mode(os.stat(path).st_mode, path)


def _check_mode(mode: int, path: str | Path) -> None:
    if stat.S_ISREG(mode):
        return
    kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, f"it is {kind}, not a regular file", str(path))


_TEMPORARY = re.compile(r"\.mmaudit-(.+)-[0-9a-f]{8}\.tmp")
_ABANDONED_SECONDS = 86_400  # age at which a temporary file of another machine is removed; its writer is unknown
_SWEEP_SECONDS = 1.0  # between two searches of a folder for leftovers: 10,000 cache files are not listed for each write
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

_swept: dict[Path, float] = {}


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary file to write, in the folder of `path`; rename it to `path` at the end, or remove it on errors.

    The bytes are flushed to disk before the rename, unless `durable` is False: then a power cut may leave a damaged
    file at `path`, which is acceptable only for a cache that verifies its files.
    """
    with _rename_in_errors(path), temporary_path(path.parent) as temporary:
        yield temporary
        if durable:
            flush(temporary)
        temporary.replace(path)
        if durable:
            flush(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, next to `path`; rename it to `path` at the end, replacing an older folder."""
    with _rename_in_errors(path), scratch_folder(path.parent) as temporary:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                flush(Path(folder, name))
            flush(Path(folder))
        replace_folder(temporary, path)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new hidden folder in `parent`, removed at the end; the next call removes that of a killed process."""
    with temporary_path(parent) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def temporary_path(parent: Path) -> Iterator[Path]:
    """Yield a path in `parent` unique among all processes and machines; it is removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    temporary = parent / f".mmaudit-{this_process()}-{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
    finally:
        _remove(temporary)


def replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; an older folder at `path` is exchanged atomically and then removed."""
    if not path.exists():
        new.replace(path)
    elif not _exchange(new, path):
        old = new.with_name(f"{new.name}.old")  # not named as a leftover: for an instant it may be the only copy
        path.replace(old)
        new.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    flush(path.parent)
    _remove(new)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders whose writers have ended."""
    with suppress(OSError):
        names = os.listdir(folder)
        for name in names:
            match = _TEMPORARY.fullmatch(name)
            if match is not None and _is_abandoned(folder / name, ProcessId.parse(match[1])):
                _remove(folder / name)


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically; names that are not UTF-8 have their bytes escaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file atomically."""
    write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", path)


def read_json(path: Path, *, error: type[MmauditError], shape: Shape | None = None) -> dict[str, Any]:
    """Read a JSON file of this shape; raise `error`, naming a wrong key, if it cannot be read."""
    try:
        check_regular(path)
        content = parse_json(path.read_bytes())
        check_shape(content, shape or {})
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read: {cause}; it is damaged, or not written by mmaudit") from cause
    return dict(content)


@contextmanager
def _rename_in_errors(path: Path) -> Iterator[None]:
    """Replace the temporary file name, or a missing name, in errors raised inside by the name of the target file."""
    try:
        yield
    except OSError as error:
        has_no_name = error.filename is None and error.errno in _WRITE_ERRORS
        if has_no_name or _TEMPORARY.search(os.fsdecode(error.filename or "")):
            error.filename, error.filename2 = str(path), None
        raise


def _sweep(folder: Path) -> None:
    time_now = time.monotonic()
    if time_now - _swept.get(folder, -_SWEEP_SECONDS) >= _SWEEP_SECONDS:
        remove_leftovers(folder)
        _swept[folder] = time_now


def _is_abandoned(path: Path, writer: ProcessId | None) -> bool:
    if writer is not None and writer.is_local():
        return not writer.is_running()
    return time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Flush the bytes of a file, or the entries of a folder, to disk."""
    is_folder = path.is_dir()
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not is_folder:  # some file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically; return False if the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(*names, 2) == 0)
    if hasattr(libc, "renameat2"):
        at_working_folder = -100  # AT_FDCWD: relative paths start from the working folder
        return bool(libc.renameat2(at_working_folder, names[0], at_working_folder, names[1], 2) == 0)
    return False
