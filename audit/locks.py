"""Write locks of folders, shared by processes and machines.

Every lock is a file of its own in a hidden folder. A writer first creates its file, then lists the files of other
processes: of two that overlap, the later one finds the earlier one and removes its own. No file is ever reused, so that
removing the file of a process that has ended releases no other lock. Readers need no lock.
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

LOCK_FOLDER = ".mmaudit-locks"
_HEARTBEAT_SECONDS = 10.0  # between two heartbeats
_STALE_SECONDS = 60.0  # without a heartbeat, after which the lock of a process on another machine counts as stale
_MIN_WAIT_SECONDS = 0.5  # in which two processes that began together sort out which of them gets the lock
_REPORT_SECONDS = 1.0  # before a wait is reported
WAIT_SECONDS = 60.0  # for which short commands wait
_UNKNOWN_HOLDER = {"scope": "", "command": "a process", "host": "an unknown host", "started": "an unknown time"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The process that holds a lock, and the part of the folder that it writes."""

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
        """Raise RunError if the lock was removed, as another process does after a long suspension of this one."""
        if not self.file.exists():
            raise RunError(
                f"the lock on {self.file.parent.parent} was lost: this process was suspended for more than "
                f"{_STALE_SECONDS:.0f} s, or the lock file was removed; run the same command again"
            )


@contextmanager
def write_lock(folder: Path, scope: str = "", *, command: str, wait_seconds: float = 0.0) -> Iterator[Lock]:
    """Lock `scope`, a path in `folder`, or all of the folder; two scopes overlap where one contains the other.

    Raises RunError with the name of the other writer if it still holds its lock after `wait_seconds`.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock = Lock(file=_acquire(folder, scope, command=command, wait_seconds=wait_seconds))
    except BaseException:
        _remove_empty([folder / LOCK_FOLDER, *created])
        raise
    owner_pid, stop = os.getpid(), threading.Event()
    threading.Thread(target=_send_heartbeats, args=(lock.file, stop), daemon=True, name="lock").start()
    try:
        remove_leftovers(folder)
        yield lock
    finally:
        try:
            _release(lock, stop, created, owner_pid=owner_pid)
        except KeyboardInterrupt:  # during the release: release again, then raise
            _release(lock, stop, created, owner_pid=owner_pid)
            raise


def find_holders(folder: Path, scope: str = "") -> list[Holder]:
    """Return the holders of locks that overlap with `scope`; locks of processes that have ended are removed."""
    return [holder for _, holder in _overlapping(folder, scope)]


def _acquire(folder: Path, scope: str, *, command: str, wait_seconds: float) -> Path:
    start_time = time.monotonic()
    is_reported = False
    while True:
        conflicts = _overlapping(folder, scope)
        if not conflicts:
            file = _create_lock_file(folder, scope, command=command)
            conflicts = [(path, holder) for path, holder in _overlapping(folder, scope) if path != file]
            if not conflicts:
                return file
            _withdraw(file, [])
        waited = time.monotonic() - start_time
        if waited >= max(wait_seconds, _MIN_WAIT_SECONDS):
            raise RunError(f"{folder / scope} is being written by {conflicts[0][1]}: wait until it has ended")
        if waited >= _REPORT_SECONDS and not is_reported:
            log.info("waiting for %s", conflicts[0][1])
            is_reported = True
        time.sleep(random.uniform(0.02, 0.2))


def _create_lock_file(folder: Path, scope: str, *, command: str) -> Path:
    """Write a lock file and return its path."""
    file = folder / LOCK_FOLDER / f"{secrets.token_hex(8)}.lock"
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
        except (FileNotFoundError, FileExistsError):  # another process removed the empty folder meanwhile
            continue
        except OSError:
            _withdraw(file, [])
            raise
    raise RunError(f"{file.parent} cannot be created: check the file system")


def _release(lock: Lock, stop: threading.Event, created: list[Path], *, owner_pid: int) -> None:
    """Stop the heartbeats and remove the lock file, in the process that acquired it and not in a fork of it."""
    stop.set()
    if os.getpid() == owner_pid:
        _withdraw(lock.file, created)


def _withdraw(file: Path, created: list[Path]) -> None:
    """Remove a lock file, and the folders that were created for it if they are empty."""
    with suppress(OSError):
        file.unlink()
    _remove_empty([file.parent, *created])


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _overlapping(folder: Path, scope: str) -> list[tuple[Path, Holder]]:
    overlapping = []
    try:
        names = sorted(os.listdir(folder / LOCK_FOLDER))
    except FileNotFoundError:  # no locks; not `glob`, which fails if another process removes the folder meanwhile
        return []
    for path in [folder / LOCK_FOLDER / name for name in names if name.endswith(".lock")]:
        entry = _read(path)
        if entry is None:
            continue
        holder, process, last_beat = entry
        if _is_stale(process, last_beat, folder):
            with suppress(OSError):
                path.unlink()
        elif _overlap(holder.scope, scope):
            overlapping.append((path, holder))
    return overlapping


def _read(path: Path) -> tuple[Holder, ProcessId | None, float] | None:
    """Read a lock file: holder, process, and time of the last heartbeat; None if it no longer exists.

    The time is that of the opened file: a network file system may cache the time of a path for a minute.
    """
    try:
        with path.open(encoding="utf-8") as file:
            last_beat = os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        content = {str(key): str(value) for key, value in dict(json.loads(text)).items()}
    except (ValueError, TypeError):
        content = {}  # damaged: it overlaps with everything until it is stale
    process = ProcessId.parse(content.get("process", ""))
    fields = {name: content.get(name, default) for name, default in _UNKNOWN_HOLDER.items()}
    return Holder(pid=0 if process is None else process.pid, **fields), process, last_beat


def _is_stale(process: ProcessId | None, last_beat: float, folder: Path) -> bool:
    if process is not None and process.is_local():
        return not process.is_running()
    return _now(folder) - last_beat > _STALE_SECONDS


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, as heartbeats of other machines are stamped by it."""
    with temporary_path(folder) as path:
        path.touch()
        return path.stat().st_mtime


def _overlap(first: str, second: str) -> bool:
    parts = [PurePosixPath(scope).parts for scope in (first, second)]
    shorter_length = min(map(len, parts))
    return parts[0][:shorter_length] == parts[1][:shorter_length]


def _send_heartbeats(file: Path, stop: threading.Event) -> None:
    """Update the time of a lock file every `_HEARTBEAT_SECONDS` until `stop` is set."""
    while not stop.wait(_HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(file)
