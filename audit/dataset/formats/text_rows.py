"""Rows of csv and JSON lines files.

Arrow ends the process at a line of `null` and at objects 3,000 levels deep, takes a NUL for the end of the file, and
names no lines. So the brackets of a file are matched beforehand, with arrays of the places where they stand.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from numpy.typing import NDArray

from ...errors import DatasetError
from ...parsing import MAX_DEPTH, parse_data_json

MAX_COLUMNS = 10_000  # of a table: a million take 13 GB
CSV_BLOCK_BYTES = 1 << 25  # that are parsed at once; a row must fit
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
        reading = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
        rows = pyarrow.csv.read_csv(path, read_options=reading, convert_options=options, parse_options=_QUOTING)
        _ = rows.schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {_csv_reason(path, error)}") from error
    return rows


def _header(path: Path) -> list[str]:
    """Return the names of the columns: types are then fixed before anything is parsed."""
    with path.open("rb") as file:
        begin = file.read(_HEADER_BYTES)
    line = begin.lstrip(b"\r\n").split(b"\n", 1)[0]
    if line.count(b",") >= MAX_COLUMNS:
        raise ValueError(f"it has {line.count(b',') + 1:,} columns; at most {MAX_COLUMNS:,} are read")
    # A reader that stops after the first block gives the header as Arrow itself reads it.
    reading = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
    with pyarrow.csv.open_csv(path, read_options=reading, parse_options=_QUOTING) as reader:
        return list(reader.schema.names)


def _csv_reason(path: Path, error: Exception) -> str:
    """Find the line that cannot be read, and why: slowly, since nothing else is left to do with the file."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    try:
        with path.open("rb") as file:
            _check_records(_lines(iter(lambda: file.readline(CSV_BLOCK_BYTES), b"")))
    except (OSError, ValueError) as wrong:
        return str(wrong)
    return (str(error).splitlines() or ["damaged"])[0]


def _lines(lines: Iterator[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if len(line) == CSV_BLOCK_BYTES:
            raise ValueError(f"line {number} has more than {CSV_BLOCK_BYTES >> 20} MiB")
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


JSON_BLOCK_BYTES = 1 << 26  # that are parsed at once; a line must fit
_CHECKED_BYTES = 1 << 22  # that are checked at once: what stays in the cache takes half the time
_MAX_COLUMNS = 10_000
_QUOTE, _NEWLINE = ord('"'), ord("\n")
_STRUCTURE = bytes(byte in b'"{}[]\n' for byte in range(256))
_STEP = np.zeros(256, dtype=np.int8)
_STEP[list(b"{[")], _STEP[list(b"}]")] = 1, -1


def read_json_lines(path: Path) -> pa.Table:
    """Read a file of JSON objects, one a line; DatasetError names the line that is none, and why."""
    try:
        _check(path)
        rows = _read(path)
        rows.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {_json_reason(path, error)}") from error
    if rows.num_columns > _MAX_COLUMNS:
        raise DatasetError(f"{path} has {rows.num_columns:,} different keys; at most {_MAX_COLUMNS:,} are columns")
    return rows


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, from 1; ValueError for one that is too long."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(JSON_BLOCK_BYTES), b""), start=1):
            if len(line) == JSON_BLOCK_BYTES:
                raise ValueError(f"line {number} has more than {JSON_BLOCK_BYTES >> 20} MiB")
            text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if text:
                yield number, text


def parse_line(number: int, text: bytes) -> dict[str, Any]:
    """Parse one line; ValueError, with its number, where it is no JSON object."""
    if b"\0" in text:
        raise ValueError(f"line {number} holds a NUL byte")
    shown = text[:_SHOWN].decode("utf-8", "replace")
    try:
        content = parse_data_json(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number}, byte {error.start + 1} is no UTF-8") from error
    except ValueError as error:
        raise ValueError(f"line {number}, {shown!r}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"line {number}, {shown!r}, is no JSON object of columns")
    return content


def _read(path: Path) -> pa.Table:
    reading = pyarrow.json.ReadOptions(block_size=JSON_BLOCK_BYTES)
    rows = pyarrow.json.read_json(path, read_options=reading)
    dates = [pa.field(field.name, pa.string()) for field in rows.schema if pa.types.is_temporal(field.type)]
    if not dates:
        return rows
    # JSON has no dates: Arrow takes strings like 2020-01-01 for some, and the id would no longer be what was written.
    as_written = pyarrow.json.ParseOptions(explicit_schema=pa.schema(dates))
    return pyarrow.json.read_json(path, read_options=reading, parse_options=as_written).select(rows.column_names)


def _check(path: Path) -> None:
    """Raise ValueError at the first lines that are not one object each, of few levels, without NUL."""
    rest, first = b"", True
    with path.open("rb") as file:
        for block in chain(iter(lambda: file.read(_CHECKED_BYTES), b""), [b"\n"]):
            whole, newline, left = block.rpartition(b"\n")
            if not newline:
                rest += block
                if len(rest) > JSON_BLOCK_BYTES:
                    raise ValueError("a line is too long")
                continue
            lines = rest + whole + newline
            _check_lines(lines.removeprefix(b"\xef\xbb\xbf") if first else lines)
            rest, first = left, False


def _check_lines(lines: bytes) -> None:
    """Check whole lines: each that is not blank opens one object, and closes it at its end."""
    if b"\0" in lines:
        raise ValueError("it holds a NUL byte")
    if b"\\" in lines:
        lines = lines.replace(b"\\\\", b"__").replace(b'\\"', b"__")  # what is left of quotes begins or ends a text
    text = np.frombuffer(lines, np.uint8)
    places = np.flatnonzero(np.frombuffer(lines.translate(_STRUCTURE), bool))
    marks = text[places]
    quotes = np.cumsum(marks == _QUOTE)
    ends = np.flatnonzero(marks == _NEWLINE)
    depth = np.cumsum(np.where(quotes % 2 == 0, _STEP[marks], 0))
    if (quotes[ends] % 2).any() or depth[ends].any() or depth.max(initial=0) > MAX_DEPTH:
        raise ValueError("quotes or brackets are not closed within their line, or too deep")
    _check_objects(lines, places, depth, ends)


def _check_objects(lines: bytes, places: NDArray[np.intp], depth: NDArray[np.int64], ends: NDArray[np.intp]) -> None:
    """Check that lines begin with the bracket that opens their one object, and end with the one that closes it."""
    opened = np.r_[0, np.cumsum((depth == 1) & (np.r_[0, depth[:-1]] == 0))]
    starts = np.r_[0, places[ends][:-1] + 1]
    objects = np.diff(np.r_[0, opened[ends + 1]])
    if (objects > 1).any():
        raise ValueError("a line holds more than one value")
    text = np.frombuffer(lines, np.uint8)
    plain = objects == 1
    # The usual line starts with { and ends with }: only others are looked at one by one.
    usual = plain & (text[starts] == ord("{")) & (text[np.maximum(places[ends] - 1, 0)] == ord("}"))
    for line in np.flatnonzero(~usual):
        content = lines[starts[line] : places[ends[line]]].strip()
        if content and not (plain[line] and content[:1] == b"{" and content[-1:] == b"}"):
            raise ValueError("a line is no object")


def _json_reason(path: Path, error: Exception) -> str:
    """Find the line that cannot be read, and why: slowly, since nothing else is left to do with the file."""
    kinds: dict[str, tuple[str, int]] = {}
    try:
        for number, text in numbered_lines(path):
            for key, kind in _kinds(parse_line(number, text), ""):
                first, line = kinds.setdefault(key, (kind, number))
                if kind != first:
                    return f"line {number}: {key!r} is {kind}, and {first} in line {line}"
    except (OSError, ValueError) as wrong:
        return str(wrong)
    return (str(error).splitlines() or ["damaged"])[0]


def _kinds(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the kind of each value, null left out, and the key that it stands under."""
    kinds = ((bool, "true or false"), ((int, float), "a number"), (str, "text"), (list, "a list"), (dict, "an object"))
    if kind := next((name for type_, name in kinds if isinstance(value, type_)), ""):
        yield key, kind
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _kinds(inner, f"{key}.{name}" if key else name)
    for inner in value if isinstance(value, list) else ():
        yield from _kinds(inner, f"{key}[]")
