"""Rows of large Parquet files, read by row group."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from ...errors import DatasetError
from ...storage import read_batches, read_footer, read_row_group, read_schema
from ..columns import SPLIT, with_split
from ..modalities import holds_bytes

_SHARD_BYTES = 1 << 26  # a row group of up to 64 MiB uncompressed is one shard; a larger one is divided
_MAX_VECTOR_ROWS = 8_192  # in a shard without media
_BUFFER_BYTES = 1 << 20  # buffer of each column; without it, or with pre_buffer, the whole row group is in memory
HEAD_ROWS, _HEAD_MEDIA = 64, 16  # rows from which kinds are inferred: without media, and with


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetShard:
    """`num_rows` rows of one row group of a Parquet file, from row `start` of the row group.

    part_rows: rows per shard of the row group (the last may have fewer); None if the row group is one shard.
    split: value of the column `split` that the rows get; None: the file's own columns are returned unchanged.
    """

    index: int
    first: int
    num_rows: int
    path: str
    row_group: int
    start: int = 0
    part_rows: int | None = None
    split: str | None = None

    @property
    def location(self) -> tuple[str, int, int]:
        """The file, the row group, and the first row in it."""
        return self.path, self.row_group, self.start

    def read(self, columns: list[str]) -> pa.Table:
        """Read these columns. Reading the shards of a row group in order is fast: each continues after the last."""
        if self.split is None:
            return self._read(columns)
        return with_split(self._read([name for name in columns if name != SPLIT]), self.split).select(columns)

    def _read(self, columns: list[str]) -> pa.Table:
        if self.part_rows is None:
            return read_row_group(self.path, self.row_group, columns=columns, error=DatasetError)
        file_status = Path(self.path).stat()  # a rewritten file is opened again
        key = (self.path, file_status.st_mtime_ns, file_status.st_size, self.row_group, tuple(columns), self.part_rows)
        reader = _open_row_group(*key)
        if reader.position > self.start:
            _open_row_group.cache_clear()
            reader = _open_row_group(*key)
        rows = reader.read(self.start, self.num_rows)
        if reader.position == reader.num_rows:
            _open_row_group.cache_clear()  # closes the file after its last row
        return rows


def row_group_shards(
    paths: Sequence[Path], *, media_rows: int, splits: Sequence[str | None] | None = None
) -> list[ParquetShard]:
    """Plan one shard per row group, or several of at most 64 MiB (and at most `media_rows` rows if they hold media).

    `splits` holds one split per path: the value of the column `split` of its rows.
    """
    shards: list[ParquetShard] = []
    first = 0
    for path, split in zip(paths, splits or [None] * len(paths), strict=True):
        footer, schema = read_footer(path, error=DatasetError), read_schema(path, error=DatasetError)
        max_rows = max_shard_rows(schema, media_rows=media_rows)
        for group in range(footer.num_row_groups):
            group_metadata = footer.row_group(group)
            part_rows = _part_rows(group_metadata.num_rows, group_metadata.total_byte_size, max_rows=max_rows)
            for start in range(
                0, group_metadata.num_rows, part_rows
            ):  # no shard for an empty row group, which Spark writes
                num_rows = min(part_rows, group_metadata.num_rows - start)
                shard = ParquetShard(
                    index=len(shards),
                    first=first + start,
                    num_rows=num_rows,
                    path=str(path),
                    row_group=group,
                    start=start,
                    part_rows=None if num_rows == group_metadata.num_rows else part_rows,
                    split=split,
                )
                shards.append(shard)
            first += group_metadata.num_rows
    return shards


def max_shard_rows(schema: pa.Schema, *, media_rows: int) -> int:
    """Return the most rows of a shard: `media_rows` if they hold media, else 8,192."""
    return media_rows if any(map(holds_bytes, schema.types)) else _MAX_VECTOR_ROWS


def parquet_head(path: Path) -> pa.Table:
    """Read the first rows of a Parquet file; for an empty file a table without rows, with all columns."""
    schema = read_schema(path, error=DatasetError)
    rows = _HEAD_MEDIA if any(map(holds_bytes, schema.types)) else HEAD_ROWS
    batches = read_batches(path, error=DatasetError, rows=rows, buffer_bytes=_BUFFER_BYTES)
    with closing(batches):
        first = next(batches, None)
    return schema.empty_table() if first is None else first.replace_schema_metadata(schema.metadata)


def _part_rows(num_rows: int, num_bytes: int, *, max_rows: int) -> int:
    if num_bytes <= _SHARD_BYTES:
        return max(1, num_rows)
    return max(1, min(max_rows, num_rows * _SHARD_BYTES // num_bytes))


class _RowGroupReader:
    """One sequential pass over a row group: earlier rows are decoded and dropped, since Parquet cannot skip rows.

    A process that reads the shards in order, all or every w-th, therefore decodes each row only once.
    """

    def __init__(self, path: str, row_group: int, columns: Sequence[str], batch_rows: int) -> None:
        footer = read_footer(path, error=DatasetError)
        self.num_rows: int = footer.row_group(row_group).num_rows
        self.position = 0
        self._path = path
        self._remainder: pa.Table | None = None
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
            batch = self._remainder if self._remainder is not None else next(self._batches, None)
            if batch is None:
                raise DatasetError(f"{self._path} has fewer rows than when it was opened: run the command again")
            num_skipped = min(max(0, start - self.position), batch.num_rows)
            part = batch.slice(num_skipped, start + num_rows - self.position - num_skipped)
            self.position += num_skipped + part.num_rows
            remainder = batch.slice(num_skipped + part.num_rows)
            self._remainder = remainder if remainder.num_rows else None
            if part.num_rows:
                parts.append(part)
        return pa.concat_tables(parts)


@lru_cache(maxsize=1)
def _open_row_group(
    path: str, modified: int, size: int, row_group: int, columns: tuple[str, ...], batch_rows: int
) -> _RowGroupReader:
    return _RowGroupReader(path, row_group, columns, batch_rows)
