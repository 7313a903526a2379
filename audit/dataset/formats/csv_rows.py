"""Rows of csv and tsv files: encoding, separator, header, and quotes that are not closed."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv

from ...errors import DatasetError
from ...parsing import decode_text, encoding_of
from ...remote.paths import AnyPath

log = logging.getLogger("mmaudit")

MAX_COLUMNS = 10_000  # of a table: a million columns take 13 GB
CSV_BLOCK_BYTES = 1 << 25  # parsed at once; the limit of a row
_HEADER_BYTES = 1 << 20
_MAX_QUOTED = 60  # characters of a row that are quoted in a message
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SEPARATOR_LINE = re.compile(rb'(?:\xef\xbb\xbf)?"?sep=([,;\t|])"?(?=\r?\n)', re.IGNORECASE)  # as Excel writes it
_NUM_SNIFFED = 20  # lines that a separator is inferred from


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvText:
    """The content of a csv file as UTF-8 bytes, and its separator.

    `is_spaced`: each separator of the header is followed by a blank, which is then no part of names, cells or quotes.
    """

    data: bytes
    separator: str
    is_spaced: bool

    @property
    def parsing(self) -> pyarrow.csv.ParseOptions:
        """Options of Arrow's parser."""
        return pyarrow.csv.ParseOptions(delimiter=self.separator, newlines_in_values=True)

    def line_of(self, position: int) -> int:
        """Return the number, from 1, of the line that contains a byte."""
        newline = b"\n" if b"\n" in self.data else b"\r"
        return self.data.count(newline, 0, position) + 1


def read_csv_rows(path: AnyPath) -> pa.Table:
    """Read a csv or tsv file, every column as strings; DatasetError with the first malformed line and the reason."""
    try:
        text = _read_text(path)
        names = _column_names(text)
        _check_quotes(text, num_columns=len(names), path=path)
        try:
            rows = _parse_spaced(text) if text.is_spaced else _parse(text, names)
        except pa.ArrowException as error:
            raise ValueError(_csv_problem(text, error)) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DatasetError(f"{path} cannot be read: {(reason.splitlines() or ['damaged'])[0]}") from error
    if text.separator != ",":
        log.info("%s: the fields are separated by %s", path, SEPARATORS[text.separator])
    elif len(names) == 1:
        log.warning("%s has one column, %r: separate fields by %s", path, names[0], ", ".join(SEPARATORS.values()))
    if names != (stripped := [name.strip() for name in names]):
        log.info("%s: blanks around the column names %s are left out", path, ", ".join(map(repr, names)))
    return rows.rename_columns(stripped)


def sniff_separator(text: str) -> str:
    """Return the separator of csv text by its first 20 lines: one of , ; tab and |.

    It is the separator that divides all these lines into the most fields, equally many in each; without one, the one
    that divides the header into the most. The comma wins a tie.
    """
    lines = [line[:_HEADER_BYTES] for line in text.splitlines()[:_NUM_SNIFFED] if line.strip()]
    num_fields = {}
    for separator in SEPARATORS:
        try:
            counts = [len(fields) for fields in csv.reader(lines, delimiter=separator)]
        except csv.Error:  # a field of more than 128 KiB
            counts = [lines[0].count(separator) + 1, 0]
        is_regular = len(set(counts)) == 1 and counts[0] > 1
        num_fields[separator] = (is_regular, counts[0] if counts else 0)
    return max(SEPARATORS, key=lambda separator: num_fields[separator])


def _read_text(path: AnyPath) -> CsvText:
    """Read a file, convert it to UTF-8 if it is UTF-16 or UTF-32, and infer its separator, unless its first line does.

    A first line sep=; becomes empty, so that line numbers in messages stay those of the file.
    """
    data = path.read_bytes()
    if encoding_of(data[:4]) != "utf-8-sig":
        data = decode_text(data).encode()
    stated = _SEPARATOR_LINE.match(data)
    if stated:
        data = data[stated.end() :]
    first_bytes = data[:_HEADER_BYTES]
    if len(data) > len(first_bytes) and b"\n" in first_bytes:
        first_bytes = first_bytes[: first_bytes.rindex(b"\n")]
    head = first_bytes.decode("utf-8-sig", "replace").lstrip("\r\n")
    separator = stated[1].decode() if stated else sniff_separator(head)
    header = head.splitlines()[0] if head else ""
    if (num_columns := header.count(separator) + 1) > MAX_COLUMNS:
        raise ValueError(f"it has {num_columns:,} columns; at most {MAX_COLUMNS:,} are read")
    is_spaced = separator != "\t" and 0 < header.count(separator) == header.count(f"{separator} ")
    return CsvText(data=data, separator=separator, is_spaced=is_spaced)


def _column_names(text: CsvText) -> list[str]:
    """Return the column names of the header, so that all types can be fixed before parsing."""
    if text.is_spaced:
        return next((fields for _, fields in _records(io.StringIO(decode_text(text.data), newline=""), text)), [])
    # A streaming reader parses the header exactly as read_csv does, and stops after the first block.
    options = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
    try:
        with pyarrow.csv.open_csv(pa.BufferReader(text.data), options, text.parsing) as reader:
            return list(reader.schema.names)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        _check_quotes(text, num_columns=0, path=None)
        raise ValueError(_csv_problem(text, error)) from error


def _parse(text: CsvText, names: Sequence[str]) -> pa.Table:
    convert_options = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in names}, strings_can_be_null=True, null_values=[""]
    )
    options = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
    rows = pyarrow.csv.read_csv(pa.BufferReader(text.data), options, text.parsing, convert_options)
    _ = rows.schema.names
    return rows


def _parse_spaced(text: CsvText) -> pa.Table:
    """Parse text with a blank after each separator, which Arrow does not support; empty cells become null."""
    lines = io.StringIO(decode_text(text.data), newline="")
    records = [fields for _, fields in _records(lines, text) if fields]
    cells = [[field.strip() or None for field in column] for column in zip(*records[1:], strict=True)]
    columns = cells or [[] for _ in records[0]]
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], records[0])


def _quoted_values(text: CsvText) -> Iterator[re.Match[bytes]]:
    """Yield each quoted value; group 1 is its closing quote, group 2 a character after it that ends no value.

    A quote opens a value at the start of a field only. `find` jumps from quote to quote: a search by one expression
    takes ten times as long.
    """
    data, separator = text.data, text.separator.encode()
    value = re.compile(rb'"[^"]*(?:""[^"]*)*("?)([^\r\n' + re.escape(separator) + rb"]?)")
    position = data.find(b'"')
    while position >= 0:
        start = position
        while text.is_spaced and data[start - 1 : start] == b" ":
            start -= 1
        is_first = start == 0 or (start == 3 and data[:3] == codecs.BOM_UTF8)
        opens = is_first or data[start - 1 : start] in (b"\r", b"\n", separator)
        match = value.match(data, position) if opens else None
        if match:
            yield match
        position = data.find(b'"', match.end(1) if match else position + 1)


def _check_quotes(text: CsvText, *, num_columns: int, path: AnyPath | None) -> None:
    """Raise ValueError with the line in which a quote opens that closes nowhere, or lines below inside another value.

    Warn of a value whose lines would all be rows without its quotes: then too a quote may have been left open.
    """
    suspects: list[re.Match[bytes]] = []
    for match in _quoted_values(text):
        if match[1] and b"\n" not in match[0] and b"\r" not in match[0]:
            continue
        if not match[1]:
            raise ValueError(f"line {text.line_of(match.start())}: a quote is never closed")
        if match[2]:
            raise ValueError(
                f"line {text.line_of(match.start())}: the quote that opens here closes in line "
                f"{text.line_of(match.end(1))}, within another value: remove it, or double the quotes inside the "
                'value ("")'
            )
        if _are_rows(text, match, num_columns=num_columns):
            suspects.append(match)
    if suspects and path is not None:
        log.warning(
            "%s, line %d: the quote that opens here closes in line %d, and each of these lines has the %d fields of a "
            "row, but they are read as one value: remove the quote if it was left open (%d such values)",
            path,
            text.line_of(suspects[0].start()),
            text.line_of(suspects[0].end(1)),
            num_columns,
            len(suspects),
        )


def _are_rows(text: CsvText, match: re.Match[bytes], *, num_columns: int) -> bool:
    """Return whether each line of a quoted value, with the rest of its first and last line, has the fields of a row."""
    start = text.data.rfind(b"\n", 0, match.start()) + 1
    if text.data.count(text.separator.encode(), start, text.data.find(b"\n", match.start())) < num_columns - 1:
        return False  # decides most texts at once
    end = text.data.find(b"\n", match.end(1))
    content = text.data[start : match.start()] + text.data[match.start() + 1 : end if end >= 0 else len(text.data)]
    records = csv.reader(content.decode("utf-8-sig", "replace").splitlines(), delimiter=text.separator)
    try:
        return num_columns > 1 and all(len(fields) == num_columns for fields in records)
    except csv.Error:
        return False


def _csv_problem(text: CsvText, error: Exception) -> str:
    """Return the first malformed line and the reason. Slow, but only called after reading has failed."""
    try:
        stream = io.BytesIO(text.data)
        for _ in _records(_decode_lines(iter(lambda: stream.readline(CSV_BLOCK_BYTES), b"")), text):
            pass
    except ValueError as cause:
        return str(cause)
    return (str(error).splitlines() or ["damaged"])[0]


def _decode_lines(lines: Iterator[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if len(line) == CSV_BLOCK_BYTES:
            raise ValueError(f"line {number} has more than {CSV_BLOCK_BYTES >> 20} MiB")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as cause:
            raise ValueError(f"line {number}, byte {cause.start + 1} is not UTF-8: save the file as UTF-8") from cause


def _records(lines: Iterator[str], text: CsvText) -> Iterator[tuple[int, list[str]]]:
    """Yield line and fields of each record; ValueError at one with another number of fields than the header."""
    records = csv.reader(lines, strict=True, delimiter=text.separator, skipinitialspace=text.is_spaced)
    num_columns, line_number = 0, 1
    while True:
        try:
            fields = next(records, None)
        except csv.Error as cause:
            raise ValueError(f"line {line_number}: {cause}") from cause
        if fields is None:
            return
        num_columns = num_columns or len(fields)
        if fields and len(fields) != num_columns:
            shown = text.separator.join(fields)[:_MAX_QUOTED]
            raise ValueError(f"line {line_number} has {len(fields)} fields, the header {num_columns}: {shown!r}")
        yield line_number, fields
        line_number = records.line_num + 1
