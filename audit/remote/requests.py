"""Requests to the file systems of fsspec: retries with backoff, time limits, errors of one line.

Every request is tried four times. A missing file raises FileNotFoundError; all else that does not succeed raises
RemoteError, which names the URL: a sample is never left out because a server did not answer.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ..errors import RemoteError, printable
from .settings import remote_settings

T = TypeVar("T")

# What each scheme needs to be installed.
PACKAGES = {
    "s3": "s3fs, with: pip install 'mmaudit[s3]'",
    "gs": "gcsfs, with: pip install gcsfs",
    "hf": "huggingface_hub, with: pip install huggingface_hub",
    "https": "aiohttp, with: pip install aiohttp",
    "http": "aiohttp, with: pip install aiohttp",
    "memory": "fsspec",
}
_WAITS = (0.1, 0.4, 1.6)  # seconds before the second, third and fourth try; ours
_CONNECT_SECONDS = 10
_RANGE_BYTES = 1 << 23  # of one request; larger ranges are divided
_MAX_GAP = 1 << 16  # bytes between two ranges that are read as one: less than a round trip of 20 ms at 10 MB/s
_MEMO_SECONDS, _MEMO_ENTRIES = 300.0, 100_000  # for which statuses are kept; `forget` drops them with each new dataset
_TAGS = ("ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime", "created")
_PERMANENT = ("Credential", "ProfileNotFound", "ParamValidation", "InvalidURL", "NonHttpUrl", "Redirect")
_DENIED, _MISSING = (401, 403), (404, 410)
_THREAD = "remote"  # name of the threads of requests
_QUERY = re.compile(r"\?[^\s'\")]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    """Size in bytes and tag of a file at a URL; the tag (ETag, digest or time) changes with the content."""

    size: int
    tag: str
    is_folder: bool = False


@dataclass(slots=True)
class _Open:
    """File systems, threads and statuses of this process."""

    pid: int
    systems: dict[str, Any]
    statuses: dict[str, tuple[float, FileStatus | None]]
    listings: dict[str, tuple[float, dict[str, FileStatus]]]
    pool: ThreadPoolExecutor | None = None


_lock = threading.RLock()
_open = _Open(0, {}, {}, {})


def _process() -> _Open:
    """Return the state of this process; that of a parent is dropped after a fork, with its connections."""
    global _open
    with _lock:
        if _open.pid != os.getpid():
            _open = _Open(os.getpid(), {}, {}, {})
        return _open


def forget(url: str | None = None) -> None:
    """Drop the statuses that this process has looked up, or that of one file with the listing of its folder."""
    state = _process()
    with _lock:
        if url is None:
            state.statuses.clear()
            state.listings.clear()
            for system in state.systems.values():
                system.invalidate_cache()
        else:
            state.statuses.pop(url, None)
            state.listings.pop(url.rpartition("/")[0], None)


def file_system(url: str) -> Any:
    """Return the fsspec file system of a URL, one per scheme and process; RemoteError if its package is missing."""
    scheme, state = urlsplit(url).scheme, _process()
    with _lock:
        if scheme not in state.systems:
            state.systems[scheme] = _connect(scheme, url)
        return state.systems[scheme]


def _connect(scheme: str, url: str) -> Any:
    import fsspec

    settings = remote_settings()
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        retries = {"total_max_attempts": 1}  # tries are counted here, for every scheme alike
        options["config_kwargs"] = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": settings.timeout_seconds,
            "retries": retries,
            "max_pool_connections": 4 * settings.num_threads,
        }
    try:
        system = fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise RemoteError(f"{url}: {scheme}:// needs the package {PACKAGES[scheme]}") from error
    if scheme == "s3":
        system.retries = 1
    if hasattr(system, "set_session"):  # by one thread: two would leave a session open
        request(url, lambda: _run(system, "set_session"))
    return system


def _run(system: Any, name: str, *args: Any, seconds: float | None = None, **options: Any) -> Any:
    """Call a method of a file system, within a time limit where it is asynchronous."""
    if not system.async_impl:
        return getattr(system, name)(*args, **options)
    from fsspec.asyn import sync

    limit = seconds or remote_settings().timeout_seconds
    method = name if name.startswith(("_", "set_")) else f"_{name}"
    return sync(system.loop, getattr(system, method), *args, timeout=limit, **options)


def call(url: str, name: str, *args: Any, seconds: float | None = None, **options: Any) -> Any:
    """Call a method of the file system of a URL, with retries; the URL is its first argument."""
    system = file_system(url)
    try:
        return request(url, lambda: _run(system, name, system._strip_protocol(url), *args, seconds=seconds, **options))
    finally:
        if name in ("pipe_file", "rm_file"):
            forget(url)


def put_file(url: str, file: Path) -> None:
    """Write a file of this machine to a URL, whole or not at all; its time limit grows with its size."""
    system = file_system(url)
    seconds = remote_settings().timeout_seconds * (1 + file.stat().st_size / _RANGE_BYTES)
    with _naming_bucket(url):
        request(url, lambda: _run(system, "put_file", str(file), system._strip_protocol(url), seconds=seconds))
    forget(url)


@contextmanager
def _naming_bucket(url: str) -> Iterator[None]:
    """Raise RemoteError where an object cannot be written since there is no bucket for it."""
    try:
        yield
    except FileNotFoundError as error:
        raise RemoteError(f"{url}: there is no such bucket to write to") from error


def create(url: str, data: bytes) -> bool:
    """Write an object unless there is one; return whether it was written.

    S3 and Google's storage decide this themselves. Where the installed file system cannot ask for that, the object is
    looked up before: of two processes at the same moment both may then write.
    """
    forget(url)
    if status_of(url) is not None:  # older versions of fsspec ignore or refuse the mode
        return False
    # s3fs knows the mode since 2025, and before ignores it; the header it passes on.
    condition: dict[str, Any] = {"IfNoneMatch": "*"} if url.startswith("s3://") else {"mode": "create"}
    try:
        with _naming_bucket(url):
            call(url, "pipe_file", data, **condition)
    except FileExistsError:
        return False
    except TypeError:
        call(url, "pipe_file", data)
    except RemoteError as error:
        refused = _status_code(error.__cause__), _status_code(error.__cause__ and error.__cause__.__cause__)
        if {409, 412} & set(refused) or "Precondition" in str(error):
            return False
        raise
    return True


def request(url: str, attempt: Callable[[], T]) -> T:
    """Return the result of a request, tried four times; raise FileNotFoundError or RemoteError."""
    for wait in (*_WAITS, None):
        try:
            return attempt()
        except (RemoteError, FileExistsError, TypeError):
            raise
        except Exception as error:  # the libraries of five schemes have exceptions of their own
            kind, reason = _failure(error)
            if kind == "missing":
                raise FileNotFoundError(2, "No such file or directory", url) from error
            if kind == "permanent":
                raise RemoteError(f"{url}: {reason}") from error
            if wait is None:
                raise RemoteError(f"{url}: {reason}, in {len(_WAITS) + 1} tries") from error
        time.sleep(wait)
    raise AssertionError


def _failure(error: Exception) -> tuple[str, str]:
    """Return whether a failure is missing, permanent or retried, and its reason in a few words."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    response = next((cause for cause in causes if _status_code(cause)), None)
    status = _status_code(response)
    names = [type(cause).__name__ for cause in causes]
    if any(isinstance(cause, PermissionError) for cause in causes) or status in _DENIED:
        return "permanent", f"access denied ({status or 403}): check the credentials and the permissions"
    permanent = next((cause for cause in causes if any(text in type(cause).__name__ for text in _PERMANENT)), None)
    if permanent is not None:
        return "permanent", _reason(permanent)
    # Of https every failure of a look-up is raised as FileNotFoundError, from the error that was its reason.
    is_plain = all(
        isinstance(cause, LookupError | FileNotFoundError) or "NotFound" in type(cause).__name__ for cause in causes
    )
    if status in _MISSING or (isinstance(error, FileNotFoundError) and is_plain):
        return "missing", ""
    if any("Timeout" in name for name in names):
        return "retried", f"no answer within {remote_settings().timeout_seconds:g} s (MMAUDIT_REMOTE_SECONDS)"
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return "permanent", _reason(error)
    return "retried", _reason(causes[-1] if isinstance(error, FileNotFoundError) else error)


def _status_code(error: BaseException | None) -> int | None:
    """Return the HTTP status that an exception of aiohttp, botocore or httpx states."""
    if error is None:
        return None
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        code: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        code = getattr(error, "status", None) or getattr(response, "status_code", None)
    return code if isinstance(code, int) else None


def _reason(error: BaseException) -> str:
    """Return the first line of a message, without queries of URLs, which may hold a signature."""
    text = (str(error).splitlines() or [""])[0]
    return printable(_QUERY.sub("", text))[:200] or type(error).__name__


def status_of(url: str) -> FileStatus | None:
    """Return the status of a file or folder, None if there is none; it is kept for five minutes."""
    state, now = _process(), time.monotonic()
    folder, _, name = url.rpartition("/")
    listing = None if is_page(url) else state.listings.get(folder)  # a page states neither sizes nor tags
    if listing is not None and now - listing[0] < _MEMO_SECONDS:
        return listing[1].get(name)
    known = state.statuses.get(url)
    if known is not None and now - known[0] < _MEMO_SECONDS:
        return known[1]
    try:
        status = _read_status(url, call(url, "info"))
    except FileNotFoundError:
        status = None
    with _lock:
        if len(state.statuses) >= _MEMO_ENTRIES:
            state.statuses.clear()
        state.statuses[url] = now, status
    return status


def _read_status(url: str, info: Mapping[str, Any]) -> FileStatus:
    is_folder = info.get("type") == "directory"
    size = info.get("size")
    if size is None and not is_folder:
        raise RemoteError(f"{url}: the server does not state its size, which ranged reads need")
    tag = next((str(info[key]) for key in _TAGS if info.get(key)), "")
    return FileStatus(size=int(size or 0), tag=tag.strip('"'), is_folder=is_folder)


def list_folder(url: str) -> dict[str, FileStatus]:
    """Return the entries of a folder by name, sorted; {} if there is none. They are kept for five minutes."""
    state, now = _process(), time.monotonic()
    known = state.listings.get(url)
    if known is not None and now - known[0] < _MEMO_SECONDS:
        return known[1]
    try:
        entries = _entries(url, call(f"{url}/", "ls", detail=True))
    except FileNotFoundError:
        entries = {}
    with _lock:
        state.listings[url] = now, entries
    return entries


def is_page(url: str) -> bool:
    """Return whether folders are pages that link to their files."""
    return url.startswith(("https://", "http://"))


def _entries(url: str, infos: Sequence[Mapping[str, Any]]) -> dict[str, FileStatus]:
    """Return the entries of a listing that lie directly in a folder; an index page may link anywhere."""
    prefix = url if is_page(url) else file_system(url)._strip_protocol(url)
    entries = {}
    for info in infos:
        path = str(info["name"]).rstrip("/")
        name = path[len(prefix) + 1 :]
        if not path.startswith(f"{prefix}/") or not name or "/" in name or "?" in name or "#" in name:
            continue
        if is_page(url) and unquote(name) in (".", ".."):
            continue
        _check_listed(url, name)
        is_folder = info.get("type") == "directory" or str(info["name"]).endswith("/")
        known = {**info, "size": info.get("size") or 0, "type": "directory" if is_folder else "file"}
        entries[name] = _read_status(url, known)
    return dict(sorted(entries.items()))


def _check_listed(url: str, path: str) -> None:
    """Raise RemoteError for an object that no relative path names: stores take . and .. for names like any other."""
    if {".", ".."} & set(path.split("/")):
        raise RemoteError(f"{url} holds {printable(path)[:200]}, which is no plain path: rename or remove that object")


def find(url: str) -> dict[str, FileStatus]:
    """Return all files below a folder by their relative paths."""
    if is_page(url):
        found: dict[str, FileStatus] = {}
        for name, status in list_folder(url).items():
            inner = find(f"{url}/{name}") if status.is_folder else {"": status}
            found |= {f"{name}/{path}".rstrip("/"): entry for path, entry in inner.items()}
        return found
    prefix = file_system(url)._strip_protocol(url)
    seconds = 60 * remote_settings().timeout_seconds  # of all pages together
    try:
        infos = call(url, "find", detail=True, seconds=seconds)
    except FileNotFoundError:
        return {}
    files = {path[len(prefix) + 1 :]: _read_status(url, info) for path, info in infos.items() if path != prefix}
    for path in files:
        _check_listed(url, path)
    return {path: status for path, status in files.items() if path and not path.endswith("/")}


def thread_pool() -> ThreadPoolExecutor:
    """Return the threads of this process in which requests run."""
    state = _process()
    with _lock:
        if state.pool is None:
            state.pool = ThreadPoolExecutor(remote_settings().num_threads, thread_name_prefix=_THREAD)
        return state.pool


def read_range(url: str, start: int, end: int, *, size: int) -> bytes:
    """Read the bytes from `start` to `end` of a file of `size` bytes; an answer of another length is retried."""
    if end <= start:
        return b""
    system = file_system(url)
    path = system._strip_protocol(url)

    def attempt() -> bytes:
        data = bytes(_run(system, "cat_file", path, start=start, end=end))
        if len(data) == size > end - start:  # a server that does not support ranges
            data = data[start:end]
        if len(data) != end - start:
            raise OSError(f"{len(data):,} bytes in place of {end - start:,}, from byte {start:,} on: it is truncated")
        return data

    return request(url, attempt)


def read_ranges(url: str, ranges: Sequence[tuple[int, int]], *, size: int) -> list[tuple[int, bytes]]:
    """Read ranges (start, end) concurrently; return (start, bytes) of what was read, sorted: near ranges as one."""
    parts = [part for span in merge_ranges(ranges) for part in _divide(*span)]
    is_nested = threading.current_thread().name.startswith(_THREAD)  # would wait for a thread of its own pool
    concurrently = map if len(parts) == 1 or is_nested else thread_pool().map
    read = concurrently(lambda part: read_range(url, *part, size=size), parts)
    return [(start, data) for (start, _), data in zip(parts, read, strict=True)]


def merge_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges sorted, those with a gap of at most 64 KiB as one, those without bytes left out."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(span for span in ranges if span[1] > span[0]):
        if merged and start - merged[-1][1] <= _MAX_GAP:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _divide(start: int, end: int) -> list[tuple[int, int]]:
    return [(first, min(first + _RANGE_BYTES, end)) for first in range(start, end, _RANGE_BYTES)]
