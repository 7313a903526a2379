"""Atomic files and folders, and Parquet files with provenance metadata under the key `mmaudit`.

All Parquet files are opened here. Every fault of a file is raised as one error that names the file: damaged pages and
footers, text that is not UTF-8, duplicate column names, row counts that the file is too small for. Page checksums are
verified where a file has them; the files of mmaudit do.
"""

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
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from .arrow import check_footer, check_row_number, plain_table
from .errors import MmauditError
from .parsing import Shape, check_shape, parse_json
from .remote.parquet import Preload, keep_footer, known_footer
from .remote.paths import AnyPath, RemotePath, source_path
from .workers import ProcessId, this_process

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
_KINDS |= dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")


def file_stamp(path: str | AnyPath) -> tuple[str, int, int | str, int] | None:
    """Return path, size, and times of modification and status change in ns; None if there is no file.

    The status change notices a file that was rewritten with its old size and modification time. A file at a URL has its
    tag (ETag, digest or time) in place of the first time.
    """
    path = source_path(path) if isinstance(path, str) else path
    if isinstance(path, RemotePath):
        remote = path.status()
        return None if remote is None else (path.url, remote.size, remote.tag, 0)
    try:
        path = os.path.realpath(path)
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_regular(path: str | AnyPath) -> BinaryIO:
    """Open a regular file to read its bytes; raise OSError for anything else, without waiting for another process.

    O_NONBLOCK opens a FIFO without waiting for a writer; it has no effect on a regular file. A file at a URL is read
    by ranges.
    """
    if isinstance(path, RemotePath):
        return cast(BinaryIO, path.open())
    check_regular(path)  # before opening, since opening some devices starts them
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | AnyPath) -> None:
    """Raise OSError unless a path is a regular file; for readers that open paths themselves."""
    if isinstance(path, RemotePath):
        path.file_status()
        return
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
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write, in the folder of `path`; rename it to `path` at the end, or remove it on errors.

    The bytes are flushed to disk before the rename, so that a power cut leaves no damaged file at `path`.
    """
    with rename_in_errors(path), temporary_path(path.parent) as temporary:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file that is never changed to a second path, or copy it where the file system has no links."""
    with rename_in_errors(target), temporary_path(target.parent) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            flush(temporary)
        temporary.replace(target)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, next to `path`; rename it to `path` at the end, replacing an older folder."""
    with rename_in_errors(path), scratch_folder(path.parent) as temporary:
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
def rename_in_errors(path: Path) -> Iterator[None]:
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


PROVENANCE_KEY = b"mmaudit"
# Arrow raises most of these itself, and Cython the rest, for damaged names and for sizes beyond memory.
_FAULTS = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError, OverflowError)
_MAX_FOOTER = 1 << 26  # bytes: 10,000 columns in 50 row groups


def write_parquet(table: pa.Table, path: Path, *, provenance: dict[str, Any]) -> None:
    """Write a table atomically; the same table gives the same bytes."""
    text = json.dumps(provenance, sort_keys=True)
    table_with_metadata = table.replace_schema_metadata({PROVENANCE_KEY: text.encode()})
    with atomic_write(path) as temporary:
        pq.write_table(table_with_metadata, temporary.absolute(), compression="zstd", write_page_checksum=True)


def read_parquet(
    path: AnyPath, *, error: type[MmauditError], shape: Shape | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its provenance, {} where it has none; raise `error` if the file cannot be read."""
    table = read_table(path, error=error)
    return table, parse_provenance(table.schema.metadata or {}, error=error, where=str(path), shape=shape)


def read_table(path: AnyPath, *, error: type[MmauditError]) -> pa.Table:
    """Read all rows of a file."""
    with open_parquet(path, error=error, preload=Preload()) as file:
        table = plain_table(file.read())
        table.validate(full=True)
        check_row_number(table.num_rows, file.metadata.num_rows)
    return table


def read_batches(
    path: AnyPath | str,
    *,
    error: type[MmauditError],
    rows: int,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
    dictionary: Sequence[str] = (),
    buffer_bytes: int = 0,
) -> Generator[pa.Table, None, None]:
    """Yield a file in batches of at most `rows` rows; columns in `dictionary` are dictionary-encoded.

    With `buffer_bytes`, columns are read in pieces of so many bytes and decoded by this thread alone: otherwise a row
    group is read whole, and the memory pools of decoding threads keep what they have freed.
    """
    with open_parquet(path, error=error, dictionary=dictionary, buffer_bytes=buffer_bytes) as file:
        names = None if columns is None else list(columns)
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        num_rows = 0
        for batch in file.iter_batches(rows, row_groups, names, use_threads=not buffer_bytes):
            batch.validate(full=True)  # otherwise text that is not UTF-8 would fail later, on conversion to str
            num_rows += len(batch)
            yield plain_table(pa.Table.from_batches([batch]))
        check_row_number(num_rows, sum(file.metadata.row_group(group).num_rows for group in groups))


def read_schema(path: AnyPath | str, *, error: type[MmauditError]) -> pa.Schema:
    """Read the schema of a file, with its metadata."""
    with open_parquet(path, error=error) as file:
        return plain_table(file.schema_arrow.empty_table()).schema


def read_row_group(path: AnyPath | str, number: int, *, columns: Sequence[str], error: type[MmauditError]) -> pa.Table:
    """Read columns of one row group."""
    with open_parquet(path, error=error, preload=Preload(row_group=number, columns=columns)) as file:
        table = plain_table(file.read_row_group(number, columns=list(columns)))
        table.validate(full=True)
        check_row_number(table.num_rows, file.metadata.row_group(number).num_rows)
    return table


def read_footer(path: AnyPath | str, *, error: type[MmauditError]) -> pq.FileMetaData:
    """Read the footer of a file: row groups, statistics, metadata."""
    with open_parquet(path, error=error) as file:
        return file.metadata


@contextmanager
def open_parquet(
    path: AnyPath | str,
    *,
    error: type[MmauditError],
    dictionary: Sequence[str] = (),
    buffer_bytes: int = 0,
    preload: Preload | None = None,
) -> Iterator[pq.ParquetFile]:
    """Open a file and check its footer; raise `error` for any fault of the file, also within the block.

    A file at a URL is read by ranges: first the `preload`, concurrently, then what is missing.
    """
    path = source_path(path) if isinstance(path, str) else path
    if not path.exists():
        raise error(f"no such file: {path}")
    try:
        check_regular(path)
        remote = path.open() if isinstance(path, RemotePath) else None
        known = known_footer(path)
        if known is None:
            with open_regular(path) if remote is None else nullcontext(cast(BinaryIO, remote)) as source:
                size = _check_size(source)
        else:
            size = known[1]
        with pq.ParquetFile(
            # Arrow would interpret a relative path such as hf:/a as a remote file system
            path.absolute() if remote is None else remote,
            metadata=None if known is None else known[0],
            pre_buffer=False,
            buffer_size=buffer_bytes,
            read_dictionary=list(dictionary),
            page_checksum_verification=True,
        ) as file:
            _check_names(file.schema_arrow, path, error=error)
            check_footer(file.metadata, size=size)
            if remote is not None:
                keep_footer(path, file.metadata, size)
                if preload is not None:
                    remote.preload(preload.ranges(file.metadata))
            yield file
    except _FAULTS as cause:
        message = (isinstance(cause, OSError) and cause.strerror) or str(cause)
        reason = (message.splitlines() or [""])[0] or type(cause).__name__
        raise error(f"{path} cannot be read as Parquet: {reason}") from cause


def parse_provenance(
    metadata: Mapping[bytes, bytes],
    *,
    error: type[MmauditError],
    where: str,
    key: bytes = PROVENANCE_KEY,
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Return the JSON object under a key of the metadata of a file, {} without the key; raise `error` if damaged."""
    try:
        content = parse_json(metadata.get(key, b"{}"))
        check_shape(content, shape or {})
    except ValueError as cause:
        raise error(f"{where}: the metadata under the key {key.decode()} are damaged: {cause}") from cause
    return dict(content)


def _check_size(source: BinaryIO) -> int:
    """Return the bytes of a file; ValueError for a footer so large that parsing it would take a gigabyte of memory."""
    size = source.seek(0, os.SEEK_END)
    source.seek(max(0, size - 8))
    footer_bytes = int.from_bytes(source.read(4), "little")
    if _MAX_FOOTER < footer_bytes <= size:
        raise ValueError(f"the footer has {footer_bytes >> 20:,} MiB, the maximum is {_MAX_FOOTER >> 20}")
    return size


def _check_names(schema: pa.Schema, path: AnyPath | str, *, error: type[MmauditError]) -> None:
    names = schema.names  # a name that is not UTF-8 fails only here
    if duplicate := next((name for name, count in Counter(names).items() if count > 1), None):
        raise error(f"{path} has {names.count(duplicate)} columns named {duplicate}: column names must be unique")
