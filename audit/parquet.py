"""Reading and writing of Parquet files with provenance metadata under the key `mmaudit`.

All Parquet files are opened here. Every fault of a file is raised as one error that names the file: damaged pages and
footers, text that is not UTF-8, duplicate column names, row counts that the file is too small for. Page checksums are
verified where a file has them; the files of mmaudit do.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import MmauditError
from .parsing import Shape, check_shape, parse_json
from .storage import atomic_write, check_regular

PROVENANCE_KEY = b"mmaudit"
# Arrow raises most of these itself, and Cython the rest, for damaged names and for sizes beyond memory.
_FAULTS = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError, OverflowError)
_MAX_FOOTER = 1 << 26  # bytes: 10,000 columns in 50 row groups
_MAX_ROWS_PER_BYTE = 256  # of a file: ascending integers, which compress best, have about 100


def write_parquet(table: pa.Table, path: Path, *, provenance: dict[str, Any]) -> None:
    """Write a table atomically; the same table gives the same bytes."""
    text = json.dumps(provenance, sort_keys=True)
    table_with_metadata = table.replace_schema_metadata({PROVENANCE_KEY: text.encode()})
    with atomic_write(path) as temporary:
        pq.write_table(table_with_metadata, temporary.absolute(), compression="zstd", write_page_checksum=True)


def read_parquet(
    path: Path, *, error: type[MmauditError], shape: Shape | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its provenance, {} where it has none; raise `error` if the file cannot be read."""
    table = read_table(path, error=error)
    return table, parse_provenance(table.schema.metadata or {}, error=error, where=str(path), shape=shape)


def read_table(path: Path, *, error: type[MmauditError]) -> pa.Table:
    """Read all rows of a file."""
    with open_parquet(path, error=error) as file:
        table = _plain(file.read())
        table.validate(full=True)
        _check_number(table.num_rows, file.metadata.num_rows)
    return table


def read_batches(
    path: Path | str,
    *,
    error: type[MmauditError],
    rows: int,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
    dictionary: Sequence[str] = (),
    buffer_bytes: int = 0,
) -> Generator[pa.Table, None, None]:
    """Yield a file in batches of at most `rows` rows; columns in `dictionary` are dictionary-encoded."""
    with open_parquet(path, error=error, dictionary=dictionary, buffer_bytes=buffer_bytes) as file:
        names = None if columns is None else list(columns)
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        num_rows = 0
        for batch in file.iter_batches(batch_size=rows, columns=names, row_groups=row_groups):
            batch.validate(full=True)  # otherwise text that is not UTF-8 would fail later, on conversion to str
            num_rows += len(batch)
            yield _plain(pa.Table.from_batches([batch]))
        _check_number(num_rows, sum(file.metadata.row_group(group).num_rows for group in groups))


def read_schema(path: Path | str, *, error: type[MmauditError]) -> pa.Schema:
    """Read the schema of a file, with its metadata."""
    with open_parquet(path, error=error) as file:
        return _plain(file.schema_arrow.empty_table()).schema


def read_row_group(path: Path | str, number: int, *, columns: Sequence[str], error: type[MmauditError]) -> pa.Table:
    """Read columns of one row group."""
    with open_parquet(path, error=error) as file:
        table = _plain(file.read_row_group(number, columns=list(columns)))
        table.validate(full=True)
        _check_number(table.num_rows, file.metadata.row_group(number).num_rows)
    return table


def read_footer(path: Path | str, *, error: type[MmauditError]) -> pq.FileMetaData:
    """Read the footer of a file: row groups, statistics, metadata."""
    with open_parquet(path, error=error) as file:
        return file.metadata


@contextmanager
def open_parquet(
    path: Path | str, *, error: type[MmauditError], dictionary: Sequence[str] = (), buffer_bytes: int = 0
) -> Iterator[pq.ParquetFile]:
    """Open a file and check its footer; raise `error` for any fault of the file, also within the block."""
    if not Path(path).exists():
        raise error(f"no such file: {path}")
    try:
        check_regular(path)
        _check_size(Path(path))
        with pq.ParquetFile(
            Path(path).absolute(),  # Arrow would interpret a relative path such as hf:/a as a remote file system
            pre_buffer=False,
            buffer_size=buffer_bytes,
            read_dictionary=list(dictionary),
            page_checksum_verification=True,
        ) as file:
            _check_names(file.schema_arrow, path, error=error)
            _check_footer(file.metadata, size=Path(path).stat().st_size)
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


def _plain(table: pa.Table) -> pa.Table:
    """Convert string and binary views to plain columns, which every Arrow function supports."""
    type_of_view = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    if not any(type_ in type_of_view for type_ in table.schema.types):
        return table
    fields = [field.with_type(type_of_view.get(field.type, field.type)) for field in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _check_size(path: Path) -> None:
    """Raise ValueError for a footer so large that parsing it would take a gigabyte of memory."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        footer_bytes = int.from_bytes(file.read(4), "little")
    if _MAX_FOOTER < footer_bytes <= size:
        raise ValueError(f"the footer has {footer_bytes >> 20:,} MiB, the maximum is {_MAX_FOOTER >> 20}")


def _check_names(schema: pa.Schema, path: Path | str, *, error: type[MmauditError]) -> None:
    names = schema.names  # a name that is not UTF-8 fails only here
    if duplicate := next((name for name, count in Counter(names).items() if count > 1), None):
        raise error(f"{path} has {names.count(duplicate)} columns named {duplicate}: column names must be unique")


def _check_number(num_rows: int, stated_rows: int) -> None:
    """Raise ValueError where pages and footer differ in the number of rows, since Arrow then silently returns fewer."""
    if num_rows != stated_rows:
        raise ValueError(f"the footer states {stated_rows:,} rows, the pages hold {num_rows:,}")


def _check_footer(footer: pq.FileMetaData, *, size: int) -> None:
    """Raise ValueError for row counts in the footer that contradict each other or the size of the file."""
    group_rows = [footer.row_group(row_group).num_rows for row_group in range(footer.num_row_groups)]
    if min(group_rows, default=0) < 0 or sum(group_rows) != footer.num_rows:
        raise ValueError(f"the footer states {footer.num_rows:,} rows, its row groups {sum(group_rows):,}")
    if footer.num_rows > size * _MAX_ROWS_PER_BYTE:
        raise ValueError(f"the footer states {footer.num_rows:,} rows, the file has only {size:,} bytes")
