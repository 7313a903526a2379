"""Run folders at URLs: a working copy on this machine, fetched before a command and published after it.

An object is visible only whole, since it is written by one put. Beside each file F of the run lies a record, an object
`.mmaudit/files/F@SIZE-SHA256`, which is put after the file and removed before it is replaced; run.json comes last and
goes first. Only files with a record are read, and each is checked against it: a reader sees the old run, none, or the
new one, never parts of two.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from ..audit.errors import RemoteError, RunError, printable
from ..audit.hashing import file_digest
from ..audit.locks import write_lock
from ..audit.parsing import parse_json
from ..audit.remote.cache import download
from ..audit.remote.locks import remote_lock
from ..audit.remote.paths import RemotePath, is_url, source_path
from ..audit.remote.requests import call, find, forget, put_file
from ..audit.remote.settings import remote_settings
from ..audit.storage import write_json

log = logging.getLogger("mmaudit")

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

WRITABLE = ("s3", "gs", "memory")  # schemes of run folders
RECORDS = ".mmaudit/files"
_STATE = ".mmaudit-remote.json"  # of the working copy: the files as they were last fetched or published
_RECORD = re.compile(r"(?P<path>[^@]+)@(?P<size>\d+)-(?P<digest>[0-9a-f]{64})")
# Files that state that what lies beside them is finished: put after it, run.json last of all.
_FINISHED = re.compile(r"(.*/)?(metrics|compare|report|apply|part-\d+)\.json")
_PART = re.compile(r"part-(\d+)\.(arrow|json)")
_WAIT_SECONDS = 3_600.0  # for another process of this machine that fetches or publishes
_MAX_NAME_BYTES = 200  # of a URL in the name of its working copy: file systems allow 255
_MAX_READS = 3  # of a run that is replaced while it is fetched


def with_run(*leave_out: str, writes: bool, in_processes: bool = False) -> Callable[[F], F]:
    """Return a decorator of a public function: its parameter `run` may then be a URL.

    Args:
        leave_out: Folders of the run that the function does not read, such as features.
        writes: Whether it writes into the run, which is then locked and published.
        in_processes: Whether several processes, of torchrun or Ray, may run it together; the first one then writes.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call_with_folder(*args: Any, **options: Any) -> Any:
            run = options.get("run", args[:1] and args[0] if next(iter(signature.parameters)) == "run" else None)
            if not is_url(run):
                return function(*args, **options)
            bound = signature.bind(*args, **options)
            path = source_path(str(run))
            if not isinstance(path, RemotePath):
                bound.arguments["run"] = path
                return function(*bound.args, **bound.kwargs)
            scope = lock_scope(function.__name__, bound.arguments) if writes else None
            if in_processes and not _is_writer(bound.arguments):
                scope = None
            elif not in_processes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise RunError(f"--run {path}: {function.__name__} runs in one process: run it without torchrun")
            left_out = ("features", "stages") if bound.arguments.get("stage") else leave_out
            if bound.arguments.get("engine") == "ray" and function.__name__ == "score":
                left_out = ("features",)  # which are those of the workers
            with working_copy(path, leave_out=left_out, scope=scope) as folder:
                bound.arguments["run"] = folder
                return function(*bound.args, **bound.kwargs)

        return call_with_folder  # type: ignore[return-value]

    return decorate


def _is_writer(options: Mapping[str, Any]) -> bool:
    """Return whether this process writes: the first of those that train together, not the one that starts Ray's."""
    return os.environ.get("RANK", "0" if options.get("engine") != "ray" else "") == "0"


def lock_scope(command: str, options: Mapping[str, Any]) -> str:
    """Return the name of the lock of a command: of other names and shards, commands run at the same time."""
    parts = (options.get(key) for key in ("name", "stage", "shard"))
    return "-".join([command, *(str(part).replace("/", "-of-") for part in parts if part)])


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size and SHA-256 of a file of a run."""

    size: int
    digest: str

    @classmethod
    def of(cls, file: Path) -> FileRecord:
        """Compute the record of a file."""
        return cls(size=file.stat().st_size, digest=file_digest(file))


@dataclass(slots=True, kw_only=True)
class WorkingCopy:
    """The working copy of a run at a URL. `synced`: size, time and record of each file as last fetched or published.

    The processes of a machine share it: one at a time fetches or publishes, from the state that the last one left.
    """

    url: RemotePath
    folder: Path
    synced: dict[str, tuple[tuple[int, int], FileRecord]] = field(default_factory=dict)

    @classmethod
    def of(cls, url: RemotePath) -> WorkingCopy:
        """Open the working copy of a run, in the folder of the cache that is named after its URL."""
        if urlsplit(url.url).scheme not in WRITABLE or len(url.parts) < 2:
            raise RunError(f"--run {url}: a run folder at a URL is s3://BUCKET/NAME or gs://BUCKET/NAME")
        short = url.name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
        name = f"{short}-{hashlib.sha256(url.url.encode()).hexdigest()[:16]}"
        return cls(url=url, folder=remote_settings().cache / "runs" / name)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes of this machine from fetching and publishing, and read the state."""
        runs = self.folder.parent
        with write_lock(runs, self.folder.name, command="mmaudit", wait_seconds=_WAIT_SECONDS):
            state = self.folder / _STATE
            files = parse_json(state.read_bytes())["files"] if state.exists() else {}
            self.synced = {
                path: ((size, modified), FileRecord(size=size, digest=digest))
                for path, (size, modified, digest) in files.items()
            }
            yield

    def save(self) -> None:
        """Write the state."""
        files = {path: [*stamp, record.digest] for path, (stamp, record) in sorted(self.synced.items())}
        write_json({"url": self.url.url, "files": files}, self.folder / _STATE)

    def fetch(self, wanted: Callable[[str], bool]) -> None:
        """Make files of the working copy those of the run; remove those that are no longer part of it.

        Raises:
            RemoteError: The run is replaced again and again, or one of its files differs from its record.
        """
        with self._alone():
            self._fetch(wanted)

    def _fetch(self, wanted: Callable[[str], bool]) -> None:
        for attempt in range(_MAX_READS):
            records = read_records(self.url)
            gone = [path for path in self.synced if wanted(path) and path not in records]
            for path in sorted(gone, key=_rank, reverse=True):
                if self._is_unchanged(path):
                    (self.folder / path).unlink(missing_ok=True)
                del self.synced[path]
            missing = [path for path in sorted(records) if wanted(path) and not self._holds(path, records[path])]
            if all(all(self._each(self._fetch_file, group, records)) for group in _by_rank(missing)):
                self.save()
                return
            log.info("%s was replaced while it was read: reading it again (%d)", self.url, attempt + 1)
        raise RemoteError(f"{self.url}: files differ from their records, or the run is being replaced: run it again")

    def publish(self) -> None:
        """Put the files that have changed since they were fetched, each with its record; remove those that are gone.

        Records of files that change are removed first, that of run.json before all others; it is put last.
        """
        with self._alone():
            self._publish()

    def _publish(self) -> None:
        present = {path: _stamp(self.folder / path) for path in _files(self.folder)}
        changed = [path for path in present if not self._is_unchanged(path)]
        if unfit := next((path for path in changed if not _is_own(path)), None):
            raise RunError(f"{self.folder / printable(unfit)}: no file of a run at a URL has such a name; rename it")
        gone = [path for path in self.synced if path not in present]
        records = {path: FileRecord.of(self.folder / path) for path in changed}
        known = read_records(self.url)
        to_put = [path for path in changed if known.get(path) != records[path]]
        to_remove = [path for path in gone if path in known]
        for path in sorted({*to_put, *to_remove} & known.keys(), key=_rank, reverse=True):
            remove(self.url / _record_name(path, known[path]))
        for group in _by_rank(to_put):
            self._each(self._put_file, group, records)
            self._each(self._put_record, group, records)
        self._each(lambda path, _: remove(self.url / path), to_remove, known)
        self.synced |= {path: (_existing(present[path]), records[path]) for path in changed}
        for path in gone:
            del self.synced[path]
        self.save()
        num_bytes = sum(records[path].size for path in to_put)
        level = logging.INFO if "run.json" in to_put else logging.DEBUG  # not of each worker's parts
        log.log(level, "%s: published %d files, %.1f MB", self.url, len(to_put), num_bytes / 1e6)

    def _each(
        self, work: Callable[[str, FileRecord], T], paths: Sequence[str], records: Mapping[str, FileRecord]
    ) -> list[T]:
        """Return work(path, record) of each path, computed concurrently."""
        with ThreadPoolExecutor(remote_settings().num_threads) as pool:
            return list(pool.map(lambda path: work(path, records[path]), paths))

    def _holds(self, path: str, record: FileRecord) -> bool:
        return self._is_unchanged(path) and self.synced[path][1] == record

    def _is_unchanged(self, path: str) -> bool:
        return path in self.synced and _stamp(self.folder / path) == self.synced[path][0]

    def _fetch_file(self, path: str, record: FileRecord) -> bool:
        """Download a file; return False if it is not there, or not as its record states."""
        file = self.folder / path
        fetched = file.with_name(f".{file.name}.fetched")
        try:
            forget(str(self.url / path))
            status = (self.url / path).status()
            if status is None or status.size != record.size:
                return False
            download(self.url / path, fetched, record.size)
        except FileNotFoundError:
            return False
        if file_digest(fetched) != record.digest:
            fetched.unlink()
            return False
        fetched.replace(file)
        self.synced[path] = _existing(_stamp(file)), record
        return True

    def _put_file(self, path: str, record: FileRecord) -> None:
        put_file(str(self.url / path), self.folder / path)

    def _put_record(self, path: str, record: FileRecord) -> None:
        # Not empty: some stores do not keep empty objects.
        call(str(self.url / _record_name(path, record)), "pipe_file", record.digest.encode())


def remove(path: RemotePath) -> None:
    """Remove an object, if it is there."""
    with suppress(FileNotFoundError):
        call(str(path), "rm_file")


def read_records(url: RemotePath) -> dict[str, FileRecord]:
    """Return the record of each file of a run by its path; RunError for a path that leads out of the run."""
    records: dict[str, FileRecord] = {}
    for name in find(str(url / RECORDS)):
        match = _RECORD.fullmatch(name)
        path = unquote(match["path"]) if match else ""
        if match is None or not _is_own(path):
            raise RunError(f"{url}/{RECORDS} holds {printable(name)[:200]}, which is no record of a file of a run")
        records[path] = FileRecord(size=int(match["size"]), digest=match["digest"])
    return records


def _record_name(path: str, record: FileRecord) -> str:
    return f"{RECORDS}/{quote(path, safe='')}@{record.size}-{record.digest}"


def _is_own(path: str) -> bool:
    """Return whether a path is one of a file of a run: relative, without hidden names, links to parents or controls."""
    is_plain = printable(path) == path and "\\" not in path
    return is_plain and not any(part in ("", "..") or part[0] == "." for part in path.split("/"))


def _rank(path: str) -> int:
    return 2 if path == "run.json" else 1 if _FINISHED.fullmatch(path) else 0


def _by_rank(paths: Sequence[str]) -> list[list[str]]:
    """Return paths in the groups in which they are put and fetched."""
    return [[path for path in paths if _rank(path) == rank] for rank in range(3)]


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _existing(stamp: tuple[int, int] | None) -> tuple[int, int]:
    assert stamp is not None
    return stamp


def _files(folder: Path) -> list[str]:
    """Return the relative paths of all files of a working copy, without hidden ones, locks and temporary files."""
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        base = Path(parent).relative_to(folder)
        paths += [(base / name).as_posix() for name in sorted(names) if name[0] != "."]
    return paths


_active: dict[Path, WorkingCopy] = {}  # working copies of the commands that run


@contextmanager
def working_copy(url: RemotePath, *, leave_out: Sequence[str], scope: str | None) -> Iterator[Path]:
    """Yield the working copy of a run as a folder; publish it at the end, unless `scope`, that of its lock, is None.

    Nothing is published after an error: what is complete stays in the working copy, and the next command continues.
    """
    copy = WorkingCopy.of(url)
    forget()
    with nullcontext() if scope is None else remote_lock(url, scope) as lock:
        copy.fetch(lambda path: path.partition("/")[0] not in leave_out)
        _active[copy.folder] = copy
        try:
            yield copy.folder
        finally:
            del _active[copy.folder]
        if lock is not None:
            lock.check()
            copy.publish()


def fetch_parts(folder: Path, numbers: Sequence[int], caches: Sequence[Path], *, folders: Sequence[str] = ()) -> None:
    """Fetch what a stage of some parts reads: their tables, those of all parts together, cache files, and folders.

    Has no effect in a run folder that is no working copy.
    """
    copy = _active.get(folder)
    if copy is None:
        return
    names = {path.relative_to(folder).as_posix() for path in caches}

    def wanted(path: str) -> bool:
        part = _PART.fullmatch(path.rpartition("/")[2])
        in_stage = path.startswith("stages/") and (part is None or int(part[1]) in numbers or _is_shared(path))
        return in_stage or path in names or path.partition("/")[0] in folders

    copy.fetch(wanted)


def share_files(folder: Path, *, is_first: bool) -> None:
    """Publish what the first of several processes has written, or fetch it in another one.

    Has no effect in a run folder that is no working copy: all processes see that.
    """
    copy = _active.get(folder)
    if copy is not None and is_first:
        copy.publish()
    elif copy is not None:
        copy.fetch(lambda path: path.partition("/")[0] != "stages")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRun:
    """A run at a URL in the workers of Ray, each of which has the working copy of its machine: a RunFolder.

    folders: Those of the run that every stage reads, such as the probes of a finished run.
    """

    url: str
    folders: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, *, folders: tuple[str, ...] = ()) -> RemoteRun | None:
        """Return the run of a working copy; None for a folder that is none, which all machines have to see."""
        copy = _active.get(folder)
        return None if copy is None else cls(url=copy.url.url, folders=folders)

    def open(self) -> Path:
        """Return the working copy of this machine as a folder."""
        copy = WorkingCopy.of(RemotePath(self.url))
        copy.folder.mkdir(parents=True, exist_ok=True)
        _active[copy.folder] = copy
        return copy.folder

    def fetch(self, folder: Path, parts: Sequence[int], files: Sequence[Path]) -> None:
        """Fetch what a stage of some parts reads."""
        fetch_parts(folder, parts, files, folders=self.folders)

    def publish(self, folder: Path) -> None:
        """Publish what has changed."""
        _active[folder].publish()


def _is_shared(path: str) -> bool:
    """Return whether a table of a stage is one of all parts, as those of the fit are."""
    return path.split("/")[-2] not in ("rows", "status", "scores", "measured")
