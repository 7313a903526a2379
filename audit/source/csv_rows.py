"""Rows of csv files: everything in them stays a string, so that the id 007 does not become 7."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from ..errors import DatasetError

MAX_COLUMNS = 10_000  # of a table: a million take 13 GB
BLOCK_BYTES = 1 << 25  # that are parsed at once; a row must fit
_HEADER_BYTES = 1 << 20
_SHOWN = 60  # characters of a row that a message repeats
_QUOTING = pyarrow.csv.ParseOptions(newlines_in_values=True)


def read_csv_rows(path: Path) -> pa.Table:
    """Read a csv file; DatasetError names the line that is none, and why."""
    try:
        names = _header(path)
        options = pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=True, null_values=[""]
        )
        reading = pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES)
        rows = pyarrow.csv.read_csv(path, read_options=reading, convert_options=options, parse_options=_QUOTING)
        _ = rows.schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {_reason(path, error)}") from error
    return rows


def _header(path: Path) -> list[str]:
    """Return the names of the columns: types are then fixed before anything is parsed."""
    with path.open("rb") as file:
        begin = file.read(_HEADER_BYTES)
    line = begin.lstrip(b"\r\n").split(b"\n", 1)[0]
    if line.count(b",") >= MAX_COLUMNS:
        raise ValueError(f"it has {line.count(b',') + 1:,} columns; at most {MAX_COLUMNS:,} are read")
    # A reader that stops after the first block gives the header as Arrow itself reads it.
    reading = pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES)
    with pyarrow.csv.open_csv(path, read_options=reading, parse_options=_QUOTING) as reader:
        return list(reader.schema.names)


def _reason(path: Path, error: Exception) -> str:
    """Find the line that cannot be read, and why: slowly, since nothing else is left to do with the file."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    try:
        with path.open("rb") as file:
            _check_records(_lines(iter(lambda: file.readline(BLOCK_BYTES), b"")))
    except (OSError, ValueError) as wrong:
        return str(wrong)
    return (str(error).splitlines() or ["damaged"])[0]


def _lines(lines: Iterator[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if len(line) == BLOCK_BYTES:
            raise ValueError(f"line {number} has more than {BLOCK_BYTES >> 20} MiB")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as wrong:
            raise ValueError(f"line {number}, byte {wrong.start + 1} is no UTF-8") from wrong


def _check_records(lines: Iterator[str]) -> None:
    """Raise ValueError at the first record that does not have the fields of the header, or whose quotes stay open."""
    records = csv.reader(lines, strict=True)
    width, start = 0, 1
    while True:
        try:
            fields = next(records, None)
        except csv.Error as wrong:
            mend = ": a quote is never closed" if "end of data" in str(wrong) else f": {wrong}"
            raise ValueError(f"line {start}{mend}") from wrong
        if fields is None:
            return
        width = width or len(fields)
        if fields and len(fields) != width:
            shown = ",".join(fields)[:_SHOWN]
            raise ValueError(f"line {start} has {len(fields)} fields, and the header {width}: {shown!r}")
        start = records.line_num + 1
