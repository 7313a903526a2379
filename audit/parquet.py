"""Parquet files, the one place where they are opened: flat columns, and under the key `mmaudit` their provenance

Whatever is wrong with a file is raised as one error that names it: damaged pages and footers, text that is no UTF-8,
columns of one name, numbers of rows that the file is too small for. Pages are compared with their checksums where
they carry some, as ours do.
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

KEY = b"mmaudit"
# Arrow raises most of these itself, and Cython the rest, when bytes are no names or sizes are no memory.
_FAULTS = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError, OverflowError)
_MAX_FOOTER = 1 << 26  # bytes: 10,000 columns in 50 row groups
_MAX_ROWS_PER_BYTE = 256  # of a file: numbers that count up have some 100, and nothing else as many


def write_parquet(table: pa.Table, path: Path, *, provenance: dict[str, Any]) -> None:
    """Write a table whole or not at all; the same table gives the same bytes."""
    text = json.dumps(provenance, sort_keys=True)
    stored = table.replace_schema_metadata({KEY: text.encode()})
    with atomic_write(path) as temporary:
        pq.write_table(stored, temporary.absolute(), compression="zstd", write_page_checksum=True)


def read_parquet(
    path: Path, *, error: type[MmauditError], shape: Shape | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its provenance, {} where it has none; what cannot be read raises `error`."""
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
    """Read a file in batches of at most `rows`; columns in `dictionary` are given as codes of their values."""
    with open_parquet(path, error=error, dictionary=dictionary, buffer_bytes=buffer_bytes) as file:
        names = None if columns is None else list(columns)
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        number = 0
        for batch in file.iter_batches(batch_size=rows, columns=names, row_groups=row_groups):
            batch.validate(full=True)  # what is no UTF-8 would else fail wherever it is made a str
            number += len(batch)
            yield _plain(pa.Table.from_batches([batch]))
        _check_number(number, sum(file.metadata.row_group(group).num_rows for group in groups))


def read_schema(path: Path | str, *, error: type[MmauditError]) -> pa.Schema:
    """Read the columns of a file, and its metadata."""
    with open_parquet(path, error=error) as file:
        return _plain(file.schema_arrow.empty_table()).schema


def read_row_group(path: Path | str, number: int, *, columns: Sequence[str], error: type[MmauditError]) -> pa.Table:
    """Read these columns of one row group."""
    with open_parquet(path, error=error) as file:
        table = _plain(file.read_row_group(number, columns=list(columns)))
        table.validate(full=True)
        _check_number(table.num_rows, file.metadata.row_group(number).num_rows)
    return table


def read_footer(path: Path | str, *, error: type[MmauditError]) -> pq.FileMetaData:
    """Read what the footer of a file says: row groups, statistics, metadata."""
    with open_parquet(path, error=error) as file:
        return file.metadata


@contextmanager
def open_parquet(
    path: Path | str, *, error: type[MmauditError], dictionary: Sequence[str] = (), buffer_bytes: int = 0
) -> Iterator[pq.ParquetFile]:
    """Open a file and check its footer; whatever is wrong with the file within the block raises `error`."""
    if not Path(path).exists():
        raise error(f"no such file: {path}")
    try:
        check_regular(path)
        _check_size(Path(path))
        with pq.ParquetFile(
            Path(path).absolute(),  # Arrow takes a relative one such as hf:/a for a remote file system's
            pre_buffer=False,
            buffer_size=buffer_bytes,
            read_dictionary=list(dictionary),
            page_checksum_verification=True,
        ) as file:
            _check_names(file.schema_arrow, path, error=error)
            _check_footer(file.metadata, size=Path(path).stat().st_size)
            yield file
    except _FAULTS as cause:
        words = (isinstance(cause, OSError) and cause.strerror) or str(cause)
        reason = (words.splitlines() or [""])[0] or type(cause).__name__
        raise error(f"{path} cannot be read as Parquet: {reason}") from cause


def parse_provenance(
    metadata: Mapping[bytes, bytes],
    *,
    error: type[MmauditError],
    where: str,
    key: bytes = KEY,
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Return what stands under a key in the metadata of a file, {} where nothing does; `error` names what is wrong."""
    try:
        content = parse_json(metadata.get(key, b"{}"))
        check_shape(content, shape or {})
    except ValueError as cause:
        raise error(f"{where}: its metadata under the key {key.decode()} are damaged: {cause}") from cause
    return dict(content)


def _plain(table: pa.Table) -> pa.Table:
    """Return views of texts and bytes as plain columns, which every function of Arrow takes."""
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    if not any(type_ in plain for type_ in table.schema.types):
        return table
    fields = [field.with_type(plain.get(field.type, field.type)) for field in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _check_size(path: Path) -> None:
    """Raise ValueError for a footer so large that parsing it alone would take a gigabyte."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        footer = int.from_bytes(file.read(4), "little")
    if _MAX_FOOTER < footer <= size:
        raise ValueError(f"its footer has {footer >> 20:,} MiB; at most {_MAX_FOOTER >> 20} are read")


def _check_names(schema: pa.Schema, path: Path | str, *, error: type[MmauditError]) -> None:
    names = schema.names  # a name that is no UTF-8 fails only when it is read
    if repeated := next((name for name, number in Counter(names).items() if number > 1), None):
        raise error(f"{path} has {names.count(repeated)} columns {repeated}: name each once")


def _check_number(number: int, stated: int) -> None:
    """Raise ValueError where pages hold other rows than the footer says: Arrow then gives fewer, without a word."""
    if number != stated:
        raise ValueError(f"its footer says {stated:,} rows, and its pages hold {number:,}")


def _check_footer(footer: pq.FileMetaData, *, size: int) -> None:
    """Raise ValueError for a footer that no writer leaves."""
    rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != footer.num_rows:
        raise ValueError(f"its footer says {footer.num_rows:,} rows, and its row groups {sum(rows):,}")
    if footer.num_rows > size * _MAX_ROWS_PER_BYTE:
        raise ValueError(f"its footer says {footer.num_rows:,} rows, and it has {size:,} bytes")
