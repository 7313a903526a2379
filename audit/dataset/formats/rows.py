"""Rows of JSON lines and Parquet files.

Arrow crashes the process on a line `null` and on objects 3,000 levels deep, treats a NUL as the end of the file, and
does not report line numbers. Therefore the brackets of a JSON file are matched first, with arrays of their positions.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from ...arrow import dataset_schema, dataset_table
from ...errors import DatasetError
from ...parsing import MAX_DEPTH, decode_text, encoding_of, parse_data_json
from ...remote.cache import read_cached
from ...remote.paths import AnyPath, RemotePath
from ...storage import file_stamp, read_batches, read_footer, read_row_group, read_schema
from ..columns import SPLIT, with_split
from ..modalities import holds_media
from .csv_rows import MAX_COLUMNS

_MAX_QUOTED = 60  # characters of a row that are quoted in a message
JSON_BLOCK_BYTES = 1 << 26  # parsed at once; the limit of a line
_CHECK_BYTES = 1 << 22  # checked at once: blocks that fit into the CPU cache take half the time
_QUOTE, _NEWLINE = ord('"'), ord("\n")
_IS_STRUCTURAL = bytes(map(b'"{}[]\n'.__contains__, range(256)))
_DEPTH_CHANGE = np.zeros(256, dtype=np.int8)
_DEPTH_CHANGE[list(b"{[")], _DEPTH_CHANGE[list(b"}]")] = 1, -1


def read_json_lines(path: AnyPath) -> pa.Table:
    """Read a file of one JSON object per line; DatasetError with the first malformed line and the reason."""
    try:
        with _open_utf8(path) as file:
            _check_json_lines(file)
        rows = _parse_json_lines(path)
        rows.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {_json_problem(path, error)}") from error
    if rows.num_columns > MAX_COLUMNS:
        raise DatasetError(f"{path} has {rows.num_columns:,} different keys; at most {MAX_COLUMNS:,} are read")
    return rows


def numbered_lines(path: AnyPath) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and text of each line that is not blank; ValueError for a line that is too long."""
    with _open_utf8(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(JSON_BLOCK_BYTES), b""), start=1):
            if len(line) == JSON_BLOCK_BYTES:
                raise ValueError(f"line {number} has more than {JSON_BLOCK_BYTES >> 20} MiB")
            text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if text:
                yield number, text


def parse_line(number: int, text: bytes) -> dict[str, Any]:
    """Parse one line; ValueError with the line number if it is not a JSON object."""
    if b"\0" in text:
        raise ValueError(f"line {number} holds a NUL byte")
    shown = text[:_MAX_QUOTED].decode("utf-8", "replace")
    try:
        content = parse_data_json(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number}, byte {error.start + 1} is not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"line {number}, {shown!r}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"line {number}, {shown!r}, is not a JSON object")
    return content


def _parse_json_lines(path: AnyPath) -> pa.Table:
    options = pyarrow.json.ReadOptions(block_size=JSON_BLOCK_BYTES)
    with _open_utf8(path) as file:
        rows = pyarrow.json.read_json(file, read_options=options)
    dates = [pa.field(field.name, pa.string()) for field in rows.schema if pa.types.is_temporal(field.type)]
    if not dates:
        return rows
    # JSON has no dates: Arrow parses strings such as 2020-01-01 as dates, which would change ids.
    as_written = pyarrow.json.ParseOptions(explicit_schema=pa.schema(dates))
    with _open_utf8(path) as file:
        rows_as_written = pyarrow.json.read_json(file, read_options=options, parse_options=as_written)
    return rows_as_written.select(rows.column_names)


def _open_utf8(path: AnyPath) -> BinaryIO:
    """Open a text file as UTF-8: the file itself, or its converted content if it is UTF-16 or UTF-32."""
    file: BinaryIO = io.BytesIO(read_cached(path, Path.read_bytes)) if isinstance(path, RemotePath) else path.open("rb")
    encoding = encoding_of(file.read(4))
    file.seek(0)
    if encoding == "utf-8-sig":
        return file
    with file:
        return io.BytesIO(decode_text(file.read()).encode())


def _check_json_lines(file: BinaryIO) -> None:
    """Raise ValueError unless every line is one object without NUL, nested at most MAX_DEPTH levels."""
    incomplete, is_first = b"", True
    for block in chain(iter(lambda: file.read(_CHECK_BYTES), b""), [b"\n"]):
        complete, newline, remainder = block.rpartition(b"\n")
        if not newline:
            incomplete += block
            if len(incomplete) > JSON_BLOCK_BYTES:
                raise ValueError("a line is too long")
            continue
        lines = incomplete + complete + newline
        _check_lines(lines.removeprefix(b"\xef\xbb\xbf") if is_first else lines)
        incomplete, is_first = remainder, False


def _check_lines(lines: bytes) -> None:
    """Raise ValueError unless each of these complete lines is blank or opens and closes exactly one object."""
    if b"\0" in lines:
        raise ValueError("it contains a NUL byte")
    if b"\\" in lines:
        lines = lines.replace(b"\\\\", b"__").replace(b'\\"', b"__")  # the remaining quotes begin or end a string
    text = np.frombuffer(lines, np.uint8)
    positions = np.flatnonzero(np.frombuffer(lines.translate(_IS_STRUCTURAL), bool))
    structural = text[positions]
    num_quotes = np.cumsum(structural == _QUOTE)
    line_ends = np.flatnonzero(structural == _NEWLINE)
    depth = np.cumsum(np.where(num_quotes % 2 == 0, _DEPTH_CHANGE[structural], 0))
    if (num_quotes[line_ends] % 2).any() or depth[line_ends].any() or depth.max(initial=0) > MAX_DEPTH:
        raise ValueError("quotes or brackets are not closed within their line, or too deep")
    _check_objects(lines, positions, depth, line_ends)


def _check_objects(
    lines: bytes, positions: NDArray[np.intp], depth: NDArray[np.int64], line_ends: NDArray[np.intp]
) -> None:
    """Raise ValueError unless each line begins and ends with the brackets of its one object."""
    num_opened = np.r_[0, np.cumsum((depth == 1) & (np.r_[0, depth[:-1]] == 0))]
    starts = np.r_[0, positions[line_ends][:-1] + 1]
    num_objects = np.diff(np.r_[0, num_opened[line_ends + 1]])
    if (num_objects > 1).any():
        raise ValueError("a line holds more than one value")
    text = np.frombuffer(lines, np.uint8)
    is_single = num_objects == 1
    # Most lines start with { and end with }: only the others are inspected one by one.
    is_plain = is_single & (text[starts] == ord("{")) & (text[np.maximum(positions[line_ends] - 1, 0)] == ord("}"))
    for line in np.flatnonzero(~is_plain):
        content = lines[starts[line] : positions[line_ends[line]]].strip()
        if content and not (is_single[line] and content[:1] == b"{" and content[-1:] == b"}"):
            raise ValueError("a line is not an object")


def _json_problem(path: AnyPath, error: Exception) -> str:
    """Return the first malformed line and the reason. Slow, but only called after reading has failed."""
    kind_of_key: dict[str, tuple[str, int]] = {}
    try:
        for number, text in numbered_lines(path):
            for key, kind in _kinds(parse_line(number, text), ""):
                first_kind, first_line = kind_of_key.setdefault(key, (kind, number))
                if kind != first_kind:
                    return f"line {number}: {key!r} is {kind}, and {first_kind} in line {first_line}"
    except (OSError, ValueError) as cause:
        return str(cause)
    return (str(error).splitlines() or ["damaged"])[0]


def _kinds(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield key and kind of each value that is not null, recursively."""
    kinds = ((bool, "true or false"), ((int, float), "a number"), (str, "text"), (list, "a list"), (dict, "an object"))
    if kind := next((name for type_, name in kinds if isinstance(value, type_)), ""):
        yield key, kind
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _kinds(inner, f"{key}.{name}" if key else name)
    for inner in value if isinstance(value, list) else ():
        yield from _kinds(inner, f"{key}[]")


_SHARD_BYTES = 1 << 26  # a row group of up to 64 MiB uncompressed is one shard; a larger one is divided
_MAX_VECTOR_ROWS = 8_192  # in a shard without media
_BUFFER_BYTES = 1 << 20  # buffer of each column; without it, or with pre_buffer, the whole row group is in memory


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
            return dataset_table(self._read(columns))
        rows = dataset_table(self._read([name for name in columns if name != SPLIT]))
        return with_split(rows, self.split).select(columns)

    def _read(self, columns: list[str]) -> pa.Table:
        if self.part_rows is None:
            return read_row_group(self.path, self.row_group, columns=columns, error=DatasetError)
        stamp = file_stamp(self.path)  # a rewritten file is opened again
        key = (self.path, stamp, self.row_group, tuple(columns), self.part_rows)
        reader = _open_row_group(*key)
        if reader.position > self.start:
            _open_row_group.cache_clear()
            reader = _open_row_group(*key)
        rows = reader.read(self.start, self.num_rows)
        if reader.position == reader.num_rows:
            _open_row_group.cache_clear()  # closes the file after its last row
        return rows


def row_group_shards(
    paths: Sequence[AnyPath], *, media_rows: int, splits: Sequence[str | None] | None = None
) -> list[ParquetShard]:
    """Plan one shard per row group, or several of at most 64 MiB (and at most `media_rows` rows if they hold media).

    `splits` holds one split per path: the value of the column `split` of its rows.
    """
    shards: list[ParquetShard] = []
    first = 0
    for path, split in zip(paths, splits or [None] * len(paths), strict=True):
        footer, schema = read_footer(path, error=DatasetError), read_parquet_schema(path)
        max_rows = max_shard_rows(schema, media_rows=media_rows)
        for group in range(footer.num_row_groups):
            group_rows, num_bytes = footer.row_group(group).num_rows, footer.row_group(group).total_byte_size
            is_large = num_bytes > _SHARD_BYTES
            part_rows = max(1, min(max_rows, group_rows * _SHARD_BYTES // num_bytes) if is_large else group_rows)
            for start in range(0, group_rows, part_rows):  # no shard for an empty row group, which Spark writes
                num_rows = min(part_rows, group_rows - start)
                shard = ParquetShard(
                    index=len(shards),
                    first=first + start,
                    num_rows=num_rows,
                    path=str(path),
                    row_group=group,
                    start=start,
                    part_rows=None if num_rows == group_rows else part_rows,
                    split=split,
                )
                shards.append(shard)
            first += group_rows
    return shards


def read_parquet_schema(path: AnyPath) -> pa.Schema:
    """Read the schema of the rows that the shards of a Parquet file return."""
    return dataset_schema(read_schema(path, error=DatasetError))


def max_shard_rows(schema: pa.Schema, *, media_rows: int) -> int:
    """Return the most rows of a shard: `media_rows` if they hold media, else 8,192."""
    return media_rows if any(map(holds_media, schema.types)) else _MAX_VECTOR_ROWS


class _RowGroupReader:
    """One sequential pass over a row group: earlier rows are decoded and dropped, since Parquet cannot skip rows.

    A process that reads the shards in order, all or every w-th, therefore decodes each row only once.
    """

    def __init__(self, path: str, row_group: int, columns: Sequence[str], batch_rows: int) -> None:
        self.num_rows: int = read_footer(path, error=DatasetError).row_group(row_group).num_rows
        self.position, self._path = 0, path
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
    path: str, stamp: object, row_group: int, columns: tuple[str, ...], batch_rows: int
) -> _RowGroupReader:
    return _RowGroupReader(path, row_group, columns, batch_rows)
