"""The local cache of files at URLs, bounded in size and shared by processes.

A file is named by a digest of its URL, size and tag, so that a changed one is downloaded again. Reading a file sets its
time; those not read for longest are removed first. Nothing is locked: a file is complete when it has its name, and a
reader whose file was removed downloads it again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ..errors import RemoteError
from .paths import RemotePath
from .requests import read_ranges
from .settings import remote_settings

T = TypeVar("T")

_FOLDER = "files"
_STEP = 0.01  # of the largest size: what a process writes between two checks; ours
_KEPT = 0.9  # of the largest size after files were removed, so that ten processes stay below it
_ABANDONED_SECONDS = 3_600  # age of the partial file of a killed process
_MAX_FETCHES = 5  # of a file that other processes keep removing

_lock = threading.Lock()
_written: dict[Path, int] = {}  # bytes since this process last checked


def cached_file(path: RemotePath) -> Path:
    """Return the local copy of a file, downloaded if the cache does not have it.

    Raises:
        FileNotFoundError, IsADirectoryError: There is no such file.
        RemoteError: It cannot be read, or is larger than the cache.
    """
    status, settings = path.file_status(), remote_settings()
    file = _entry((path.url, status.size, status.tag))
    with suppress(OSError):
        if file.stat().st_size == status.size:
            os.utime(file)
            return file
    if status.size > settings.cache_bytes:
        raise RemoteError(
            f"{path} has {status.size:,} bytes, the cache {settings.cache_bytes:,}: set MMAUDIT_CACHE_GB higher"
        )
    download(path, file, status.size)
    _check_size(settings.cache / _FOLDER, status.size, settings.cache_bytes)
    return file


def read_cached(path: RemotePath, read: Callable[[Path], T]) -> T:
    """Return what a function reads of the local copy of a file, downloaded again if it is removed in between."""
    for _ in range(_MAX_FETCHES):
        file = cached_file(path)
        try:
            return read(file)
        except FileNotFoundError:
            continue
    raise RemoteError(f"{path} was removed from the cache {_MAX_FETCHES} times before it was read: MMAUDIT_CACHE_GB")


def read_entry(key: object) -> bytes | None:
    """Return what `write_entry` has kept under a key; None if there is nothing."""
    file = _entry(key)
    try:
        data = file.read_bytes()
        os.utime(file)
    except OSError:
        return None
    return data


def write_entry(key: object, data: bytes) -> None:
    """Keep bytes under a key, of which its repr is used; what cannot be written, or is too large, is not kept."""
    file, settings = _entry(key), remote_settings()
    if len(data) > settings.cache_bytes:
        return
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return
    _check_size(settings.cache / _FOLDER, len(data), settings.cache_bytes)


def _entry(key: object) -> Path:
    """Return the file of a key."""
    name = hashlib.blake2b(repr(key).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return remote_settings().cache / _FOLDER / name[:2] / name


def download(path: RemotePath, file: Path, size: int) -> None:
    """Write a file under a temporary name, in concurrent ranges, and rename it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("wb") as output:
                for start in range(0, size, _BLOCK):
                    for _, data in read_ranges(path.url, [(start, min(size, start + _BLOCK))], size=size):
                        output.write(data)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename == path.url:
            raise
        raise RemoteError(f"{file.parent}: the cache cannot be written ({error.strerror}): MMAUDIT_CACHE") from error


_BLOCK = 1 << 26  # bytes in memory while a large file is downloaded


def _check_size(folder: Path, num_bytes: int, max_bytes: int) -> None:
    """Remove files if the cache is too large, after each hundredth of its size that this process has written."""
    with _lock:
        is_first = folder not in _written
        _written[folder] = _written.get(folder, 0) + num_bytes
        if not is_first and _written[folder] < _STEP * max_bytes:
            return
        _written[folder] = 0
    remove_oldest(folder, max_bytes)


def remove_oldest(folder: Path, max_bytes: int) -> None:
    """Remove the files not read for longest until the others have at most nine tenths of `max_bytes`."""
    files: list[tuple[float, int, str]] = []
    for parent, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(parent, name)
            with suppress(OSError):
                status = os.stat(file)
                if name.endswith(".tmp"):
                    if time.time() - status.st_mtime > _ABANDONED_SECONDS:
                        os.unlink(file)
                    continue
                files.append((status.st_mtime, status.st_size, file))
    total = sum(size for _, size, _ in files)
    if total <= _KEPT * max_bytes:
        return
    for _, size, file in sorted(files):
        if total <= _KEPT * max_bytes:
            break
        with suppress(OSError):
            os.unlink(file)
        total -= size
