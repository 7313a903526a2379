"""Rows of large Parquet files, read by row group."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from ...errors import DatasetError
from ...parquet import read_batches, read_footer, read_row_group, read_schema
from ..columns import SPLIT, with_split
from ..modalities import holds_bytes

_WHOLE_BYTES = 1 << 26  # a row group of 64 MiB uncompressed is one shard; a larger one is cut into such
_VECTOR_ROWS = 8_192  # at most in a shard of a row group that is cut
_BUFFER_BYTES = 1 << 20  # read ahead of each column; without it, or with pre_buffer, a row group is held whole
_HEAD_ROWS, _HEAD_MEDIA = 64, 16  # rows from which kinds are inferred, and where rows hold media


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetShard:
    """`num_rows` rows of one row group of a Parquet file, from its row `start` on.

    `part_rows` is how many rows a part of the row group has, the last may have fewer; None where it is not cut.
    `split` is what the file's name says of them, and None where it says nothing.
    """

    index: int
    first: int
    num_rows: int
    path: str
    row_group: int
    start: int = 0
    part_rows: int | None = None
    split: str | None = None

    def read(self, columns: list[str]) -> pa.Table:
        """Read these columns. Parts of a row group are quick to read in their order: each goes on where one ended."""
        if self.split is None:
            return self._read(columns)
        return with_split(self._read([name for name in columns if name != SPLIT]), self.split).select(columns)

    def _read(self, columns: list[str]) -> pa.Table:
        if self.part_rows is None:
            return read_row_group(self.path, self.row_group, columns=columns, error=DatasetError)
        about = Path(self.path).stat()  # a file that was written anew is another
        key = (self.path, about.st_mtime_ns, about.st_size, self.row_group, tuple(columns), self.part_rows)
        stream = _stream(*key)
        if stream.position > self.start:
            _stream.cache_clear()
            stream = _stream(*key)
        rows = stream.read(self.start, self.num_rows)
        if stream.position == stream.num_rows:
            _stream.cache_clear()  # no file stays open after its last row
        return rows


def row_group_shards(
    paths: Sequence[Path], *, media_rows: int, splits: Sequence[str | None] | None = None
) -> list[ParquetShard]:
    """Plan one shard for each row group, or several of at most 64 MiB (and `media_rows` where rows hold media).

    `splits` is one for each path: the column `split` that its rows get.
    """
    shards: list[ParquetShard] = []
    first = 0
    for path, split in zip(paths, splits or [None] * len(paths), strict=True):
        footer, schema = read_footer(path, error=DatasetError), read_schema(path, error=DatasetError)
        most = media_rows if any(map(holds_bytes, schema.types)) else _VECTOR_ROWS
        for group in range(footer.num_row_groups):
            about = footer.row_group(group)
            size = _part_rows(about.num_rows, about.total_byte_size, most=most)
            for start in range(0, about.num_rows, size):  # none where Spark wrote a file without rows
                rows = min(size, about.num_rows - start)
                shard = ParquetShard(
                    index=len(shards),
                    first=first + start,
                    num_rows=rows,
                    path=str(path),
                    row_group=group,
                    start=start,
                    part_rows=None if rows == about.num_rows else size,
                    split=split,
                )
                shards.append(shard)
            first += about.num_rows
    return shards


def parquet_head(path: Path) -> pa.Table:
    """Read the first rows of a Parquet file: none of an empty one, but always its columns."""
    schema = read_schema(path, error=DatasetError)
    rows = _HEAD_MEDIA if any(map(holds_bytes, schema.types)) else _HEAD_ROWS
    batches = read_batches(path, error=DatasetError, rows=rows, buffer_bytes=_BUFFER_BYTES)
    with closing(batches):
        first = next(batches, None)
    return schema.empty_table() if first is None else first.replace_schema_metadata(schema.metadata)


def _part_rows(num_rows: int, num_bytes: int, *, most: int) -> int:
    if num_bytes <= _WHOLE_BYTES:
        return max(1, num_rows)
    return max(1, min(most, num_rows * _WHOLE_BYTES // num_bytes))


class _Stream:
    """One pass over a row group. What lies before the rows asked for is decoded and dropped: Parquet has no other way.

    So a process that reads the shards in order decodes each row once, and one that reads every w-th of them no more.
    """

    def __init__(self, path: str, row_group: int, columns: Sequence[str], batch_rows: int) -> None:
        footer = read_footer(path, error=DatasetError)
        self.num_rows: int = footer.row_group(row_group).num_rows
        self.position = 0
        self._path = path
        self._rest: pa.Table | None = None
        self._batches = read_batches(
            path,
            error=DatasetError,
            rows=batch_rows,
            columns=columns,
            row_groups=[row_group],
            buffer_bytes=_BUFFER_BYTES,
        )

    def read(self, start: int, num_rows: int) -> pa.Table:
        parts = []
        while self.position < start + num_rows:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                raise DatasetError(f"{self._path} has fewer rows than when it was opened: run the command again")
            skipped = min(max(0, start - self.position), batch.num_rows)
            part = batch.slice(skipped, start + num_rows - self.position - skipped)
            self.position += skipped + part.num_rows
            left = batch.slice(skipped + part.num_rows)
            self._rest = left if left.num_rows else None
            if part.num_rows:
                parts.append(part)
        return pa.concat_tables(parts)


@lru_cache(maxsize=1)
def _stream(path: str, modified: int, size: int, row_group: int, columns: tuple[str, ...], batch_rows: int) -> _Stream:
    return _Stream(path, row_group, columns, batch_rows)
