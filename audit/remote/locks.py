"""Locks of folders at URLs: objects that are created only if they are absent, renewed while they are held.

A lock names host, process and command. That of a process of this machine that has ended is taken over at once, that of
another machine, or a damaged one, when it was not renewed while it was watched: clocks are not compared. A lock is read
once more before it is removed. There is no removal on a condition: a lock that is created between that reading and the
removal is lost, and its process ends with an error before it publishes. Where a store cannot create conditionally, two
processes that begin at the same moment may both get the lock.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from urllib.parse import quote

from ..errors import RemoteError, RunError, printable
from ..workers import ProcessId, this_process
from .paths import RemotePath
from .requests import call, create, forget

log = logging.getLogger("mmaudit")

FOLDER = ".mmaudit/locks"
_RENEW_SECONDS = 10.0
_WATCH_SECONDS = 30.0  # without a renewal, after which a lock is taken over


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteLock:
    """A lock that this process holds; `token` differs from those of all others."""

    path: RemotePath
    token: str
    command: str
    renewal: int = 0

    def content(self) -> bytes:
        """Return the content of the object."""
        renewal = f"{self.renewal:08d}"  # of one length: a reader asks for the size before it reads
        about = {"token": self.token, "command": self.command, "renewal": renewal, "host": socket.gethostname()}
        about |= {"process": str(this_process()), "started": datetime.now().isoformat(" ", "seconds")}
        return json.dumps(about, sort_keys=True).encode()

    def check(self) -> None:
        """Raise RunError if another process has taken the lock over."""
        if _read(self.path).get("token") != self.token:
            raise RunError(f"{self.path}: the lock was taken over, since it was not renewed in time: run it again")


@contextmanager
def remote_lock(folder: RemotePath, scope: str) -> Iterator[RemoteLock]:
    """Hold the lock of a scope of a folder; RunError with the name of its holder if another process holds it."""
    path = folder / f"{FOLDER}/{quote(scope, safe='')}.json"
    lock = RemoteLock(path=path, token=secrets.token_hex(16), command=f"mmaudit {scope}")
    while not create(str(path), lock.content()):
        if _read(path).get("token") == lock.token:  # it was written, and the answer was lost
            break
        stale = _wait_until_stale(path)
        if stale is not None and _content(path) == stale:
            with suppress(FileNotFoundError):
                call(str(path), "rm_file")
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(lock, stop), daemon=True, name="lock")
    thread.start()
    try:
        yield lock
    finally:
        stop.set()
        thread.join()
        with suppress(FileNotFoundError, RemoteError):
            if _read(path).get("token") == lock.token:
                call(str(path), "rm_file")


def _renew(lock: RemoteLock, stop: threading.Event) -> None:
    while not stop.wait(_RENEW_SECONDS):
        lock = replace(lock, renewal=lock.renewal + 1)
        with suppress(RemoteError, RunError, OSError):
            lock.check()
            call(str(lock.path), "pipe_file", lock.content())


def _wait_until_stale(path: RemotePath) -> bytes | None:
    """Return the content of a lock that may be taken over, None if there is no lock; raise RunError if it is held."""
    first = _content(path)
    about = _parse(first)
    process = ProcessId.parse(about.get("process", ""))
    is_local = process is not None and process.is_local()
    if first is None or (process is not None and is_local and not process.is_running()):
        return first
    holder = f"{about.get('command', 'a process')} (process {process.pid if process else 0} on {about.get('host')})"
    held = RunError(f"{path} is held by {printable(holder)}: wait until it has ended")
    if is_local:
        raise held
    log.info("%s is held by %s: watching for %.0f s whether it still runs", path, printable(holder), _WATCH_SECONDS)
    end = time.monotonic() + _WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, _WATCH_SECONDS / 10))
        now = _content(path)
        if now is None:
            return None
        if now != first and about:
            raise held
        if now != first:  # it was damaged, or read while it was replaced
            return _wait_until_stale(path)
    return first


def _content(path: RemotePath) -> bytes | None:
    """Read the bytes of a lock; None if there is none."""
    forget(str(path))
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes | None) -> dict[str, str]:
    """Return what a lock states; {} if there is none, or it is damaged."""
    try:
        return {str(key): str(value) for key, value in dict(json.loads(content or b"{}")).items()}
    except (ValueError, TypeError, RecursionError):
        return {}


def _read(path: RemotePath) -> dict[str, str]:
    """Read what a lock states, again if it is damaged; {} if there is none, or it stays so."""
    return _parse(_content(path)) or _parse(_content(path))
