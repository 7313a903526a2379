"""Locks of writers: which process writes what in a folder.

Every lock is a file of its own in a hidden folder. A writer puts its file there, then looks for files of others: of two
that overlap, the later one sees the earlier one and withdraws. No file is ever reused, so that removing the file of a
process that has ended takes nothing from anybody. Readers need no lock.
"""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

from .errors import RunError
from .storage import remove_leftovers, temporary_path, write_json
from .workers import ProcessId, this_process

log = logging.getLogger("mmaudit")

FOLDER = ".mmaudit-locks"
_BEAT_SECONDS = 10.0  # between two signs of life
_STALE_SECONDS = 60.0  # without a sign of life, of a process whose number cannot be looked up here
_GRACE_SECONDS = 0.5  # in which two that began together are told apart
_PATIENCE_SECONDS = 1.0  # before a wait is reported
WAIT_SECONDS = 60.0  # that short commands wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock, on which part of the folder."""

    scope: str
    command: str
    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid} on {self.host}, since {self.started})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A lock that this process holds."""

    file: Path

    def check(self) -> None:
        """Raise RunError where another process has taken the lock over, as after a long suspension."""
        if not self.file.exists():
            raise RunError(
                f"the lock on {self.file.parent.parent} was lost: this process was suspended for more than "
                f"{_STALE_SECONDS:.0f} s, or somebody removed the lock; run the same command again"
            )


@contextmanager
def write_lock(folder: Path, scope: str = "", *, command: str, wait_seconds: float = 0.0) -> Iterator[Lock]:
    """Hold the right to write `scope`, a path in `folder`, or all of it; two overlap where one contains the other.

    Raises RunError that names the other writer where it is still there after `wait_seconds`.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock = Lock(file=_acquire(folder, scope, command=command, wait_seconds=wait_seconds))
    except BaseException:
        _remove_empty([folder / FOLDER, *created])
        raise
    owner, ended = os.getpid(), threading.Event()
    threading.Thread(target=_beat, args=(lock.file, ended), daemon=True, name="lock").start()
    try:
        remove_leftovers(folder)
        yield lock
    finally:
        try:
            _release(lock, ended, created, owner=owner)
        except KeyboardInterrupt:  # while it was released: it comes once
            _release(lock, ended, created, owner=owner)
            raise


def holders_of(folder: Path, scope: str = "") -> list[Holder]:
    """Return who writes `scope`, or what contains it or lies in it; locks of processes that have ended are removed."""
    return [holder for _, holder in _overlapping(folder, scope)]


def _acquire(folder: Path, scope: str, *, command: str, wait_seconds: float) -> Path:
    start = time.monotonic()
    is_reported = False
    while True:
        others = _overlapping(folder, scope)
        if not others:
            file = _announce(folder, scope, command=command)
            others = [(path, holder) for path, holder in _overlapping(folder, scope) if path != file]
            if not others:
                return file
            _withdraw(file, [])
        waited = time.monotonic() - start
        if waited >= max(wait_seconds, _GRACE_SECONDS):
            raise RunError(f"{folder / scope} is being written by {others[0][1]}: wait until it has ended")
        if waited >= _PATIENCE_SECONDS and not is_reported:
            log.info("waiting for %s", others[0][1])
            is_reported = True
        time.sleep(random.uniform(0.02, 0.2))


def _announce(folder: Path, scope: str, *, command: str) -> Path:
    """Write the file of a lock and return it."""
    file = folder / FOLDER / f"{secrets.token_hex(8)}.lock"
    content = {
        "scope": scope,
        "command": command,
        "host": socket.gethostname(),
        "process": str(this_process()),
        "started": datetime.now().isoformat(" ", "seconds"),
    }
    for _ in range(20):
        try:
            write_json(content, file)
            return file
        except FileNotFoundError:  # whoever withdrew last removed the folder meanwhile
            continue
        except OSError:
            _withdraw(file, [])
            raise
    raise RunError(f"{file.parent} cannot be made: check the file system")


def _release(lock: Lock, ended: threading.Event, created: list[Path], *, owner: int) -> None:
    """End the signs of life and remove the file of a lock, in the process that took it and not in a fork of it."""
    ended.set()
    if os.getpid() == owner:
        _withdraw(lock.file, created)


def _withdraw(file: Path, created: list[Path]) -> None:
    """Remove the file of a lock, and the folders that were made for it and hold nothing else."""
    with suppress(OSError):
        file.unlink()
    _remove_empty([file.parent, *created])


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _overlapping(folder: Path, scope: str) -> list[tuple[Path, Holder]]:
    overlapping = []
    for path in sorted((folder / FOLDER).glob("*.lock")):
        entry = _read(path)
        if entry is None:
            continue
        holder, process, beat = entry
        if _is_stale(process, beat, folder):
            with suppress(OSError):
                path.unlink()
        elif _overlap(holder.scope, scope):
            overlapping.append((path, holder))
    return overlapping


def _read(path: Path) -> tuple[Holder, ProcessId | None, float] | None:
    """Read the file of a lock: who, which process, and its last sign of life; None where it is gone.

    The time is that of the opened file: what a network file system remembers of a name may be a minute old.
    """
    try:
        with path.open(encoding="utf-8") as file:
            beat = os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        content = {str(key): str(value) for key, value in dict(json.loads(text)).items()}
    except (ValueError, TypeError):
        content = {}  # damaged: it overlaps with everything until it is stale
    process = ProcessId.parse(content.get("process", ""))
    holder = Holder(
        scope=content.get("scope", ""),
        command=content.get("command", "a process"),
        host=content.get("host", "an unknown host"),
        pid=0 if process is None else process.pid,
        started=content.get("started", "an unknown time"),
    )
    return holder, process, beat


def _is_stale(process: ProcessId | None, beat: float, folder: Path) -> bool:
    if process is not None and process.is_local():
        return not process.is_running()
    return _now(folder) - beat > _STALE_SECONDS


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, which another machine's sign of life was given by."""
    with temporary_path(folder) as path:
        path.touch()
        return path.stat().st_mtime


def _overlap(first: str, second: str) -> bool:
    parts = [PurePosixPath(scope).parts for scope in (first, second)]
    shared = min(map(len, parts))
    return parts[0][:shared] == parts[1][:shared]


def _beat(file: Path, ended: threading.Event) -> None:
    """Give a sign of life now and then."""
    while not ended.wait(_BEAT_SECONDS):
        with suppress(OSError):
            os.utime(file)
