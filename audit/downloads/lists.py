"""Reading of the lists of a download: encodings, separators, quotes and headers."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from ..media.files import LFS_HINT, is_hidden, is_lfs_pointer
from ..parsing import decode_text

_SHOWN = 120  # characters of a line that a message repeats
_SPLITS = (("train", "train"), ("val", "validation"), ("dev", "validation"), ("test", "test"))
_SEPARATOR_LINES = 1000  # from which the separator is inferred; ours
_MIN_SHARE = 0.5  # of records that a separator divides, for blanks to be part of the fields; ours
_QUOTED = ",;|\t"  # separators of lists in which a quote protects the separator; & and blanks have no such rule
_HEADER_NAMES = frozenset(
    re.findall(
        r"\w+",
        """
        category class clip clip_id clip_name duration emotion end end_seconds end_time endtime file file_name filename
        id image index label label_id name path quality sample seconds split start start_seconds start_time starttime
        target text time time_end time_start video video_id video_name videoid youtube_id ytid
        """,
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One non-blank line, split into fields; a record quoted over several lines has the number of its last line."""

    path: Path
    number: int
    text: str
    fields: tuple[str, ...]

    @property
    def where(self) -> str:
        """Return the file and line number for messages."""
        return f"{self.path}, line {self.number}"

    def error_expecting(self, expected: str) -> DatasetError:
        """Return the error for a line that does not have the expected form."""
        text = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
        mend = "correct the line, or pass a list of that form with --list"
        return DatasetError(f"{self.where}: {text!r} is not {expected}: {mend}")

    def read_int(self, index: int, *, expected: str) -> int:
        """Parse a field as a non-negative integer; 30.0 is 30."""
        text = re.sub(r"\.0+$", "", self.fields[index].strip())
        if not (text.isascii() and text.isdigit()):
            raise self.error_expecting(expected)
        return int(text)


def read_list(path: Path, separators: str) -> list[Line]:
    """Read the non-blank lines of a list, split at the one of `separators` that fits them best.

    Args:
        path: File in UTF-8, or in another Unicode encoding with its byte order mark.
        separators: Possible separators in order of preference; a blank stands for any white space.

    Returns:
        The lines in order, a header included.

    Raises:
        DatasetError: The file is no text, or a quote is not closed; with the line where that quote opens.
    """
    lines = list(io.StringIO(read_text(path), newline=""))
    separator = _infer_separator(lines, separators)
    if separator not in _QUOTED:
        return _plain_lines(path, lines, separator)
    try:
        return _quoted_lines(path, lines, separator)
    except DatasetError:
        plain_lines = _plain_lines(path, lines, separator)
        num_fields = {len(line.fields) for line in plain_lines[1:]}
        if separator == "\t" and len(num_fields) == 1 and num_fields != {1}:
            return plain_lines  # in lists with tabs a quote may be a plain character, as in tweets
        raise


def _infer_separator(lines: Sequence[str], separators: str) -> str:
    """Return the separator that gives the largest share of records the same number of fields, above one.

    A share, since a header may have fewer names than the rows have fields, and since one damaged line is to be reported
    as such. Blanks separate only where nothing else divides half of the records: classes may consist of two words.
    """
    sample = [line for line in lines[:_SEPARATOR_LINES] if line.strip()]
    shares = {separator: _share_of_equal(sample, separator) for separator in separators}
    best = max(separators.replace(" ", ""), key=lambda separator: shares[separator])
    return " " if shares.get(" ", 0) > 0 and shares[best] < _MIN_SHARE else best


def _share_of_equal(lines: Sequence[str], separator: str) -> float:
    """Return the share of records with the most frequent number of fields, if that is above one."""
    records: Iterable[list[str]] = (line.split(None if separator == " " else separator) for line in lines)
    if separator in _QUOTED:
        records = csv.reader(lines, delimiter=separator)
    try:
        counts = Counter(map(len, records))
    except csv.Error:  # an open quote, reported when the list is read
        counts = Counter(line.count(separator) + 1 for line in lines)
    return max((count for num_fields, count in counts.items() if num_fields > 1), default=0) / max(1, counts.total())


def _plain_lines(path: Path, lines: Sequence[str], separator: str) -> list[Line]:
    """Split each line by itself; a field within quotes is unquoted where its separator could be quoted."""
    plain_lines = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text = line.rstrip("\r\n") if separator == "\t" else line.strip()
        fields = text.split(None if separator == " " else separator)
        if separator in _QUOTED:
            fields = [_unquote(field) for field in fields]
        plain_lines.append(Line(path=path, number=number, text=text, fields=tuple(fields)))
    return plain_lines


def _unquote(field: str) -> str:
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"'
    return field[1:-1].replace('""', '"') if is_quoted else field


def _quoted_lines(path: Path, lines: Sequence[str], separator: str) -> list[Line]:
    """Read records as csv; DatasetError for a quote that is not closed, or closes in another record."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    records: list[Line] = []
    spans: list[tuple[int, int]] = []  # first and last line of records over several lines
    first = 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                text = separator.join(fields)
                records.append(Line(path=path, number=reader.line_num, text=text, fields=tuple(fields)))
                if reader.line_num > first:
                    spans.append((first, reader.line_num))
            first = reader.line_num + 1
    except csv.Error as error:
        raise _quoting_error(path, lines[first - 1 : reader.line_num], separator, first=first, error=error) from error
    if spans:
        _check_spans(path, lines, separator, spans=spans, records=records)
    return records


def _quoting_error(path: Path, lines: Sequence[str], separator: str, *, first: int, error: csv.Error) -> DatasetError:
    """Return the error for a record that csv cannot read, with the line where its last quote opens."""
    opening, last = first + _last_opening(lines, separator), first + len(lines) - 1
    if opening == last and "end of data" not in str(error):
        return DatasetError(f"{path}, line {last}: {error}; correct the quoting of this line")
    closing = f"is closed only on line {last}" if "end of data" not in str(error) else "is never closed"
    return DatasetError(f'{path}, line {opening}: the quote that opens here {closing}: close it, or write "" for "')


def _last_opening(lines: Sequence[str], separator: str) -> int:
    """Return the index of the line in which the last quote of a record opens."""
    opening, is_open, is_field_start, is_closed_before = 0, False, True, False
    for index, line in enumerate(lines):
        for character in line:
            is_closing = is_open and character == '"'
            if character == '"' and not is_open and is_field_start:
                is_open, opening = True, index
            elif character == '"':  # a doubled quote closes and opens again
                is_open = is_closed_before
            is_closed_before, is_field_start = is_closing, character == separator
        is_closed_before, is_field_start = False, True
    return opening


def _check_spans(
    path: Path, lines: Sequence[str], separator: str, *, spans: Iterable[tuple[int, int]], records: Sequence[Line]
) -> None:
    """Raise DatasetError if a quoted field contains lines that are rows of the list: its quote was never closed."""
    last_lines = {last for _, last in spans}
    values = {cell for line in records if line.number not in last_lines for cell in enumerate(line.fields)}
    num_fields = Counter(len(line.fields) for line in records).most_common(1)[0][0]
    for first, last in spans:
        opening, *rows = (line.rstrip("\r\n").split(separator) for line in lines[first - 1 : last])
        column = next((index for index, cell in enumerate(opening) if cell.startswith('"') and cell.count('"') % 2), 0)
        # The end of the last line belongs to the record in any case. Evidence are the cells before the quoted one, or
        # without any the lines before the last one.
        if column == 0:
            rows, columns = rows[:-1], range(1, num_fields)
        else:
            columns = range(column)
        are_rows = all(len(row) >= num_fields and _resembles(row, opening, values, columns) for row in rows)
        if rows and len(opening) >= num_fields and are_rows:
            raise DatasetError(
                f"{path}, line {first}: the quote that opens here is closed only on line {last}, and the lines up to "
                'there are rows of their own: close it, or write "" for "'
            )


def _resembles(
    row: Sequence[str], opening: Sequence[str], values: set[tuple[int, str]], columns: Iterable[int]
) -> bool:
    """Return whether a cell of the row is a number or file name as in the opening row, or a value of its column."""
    return any(
        (index, row[index]) in values
        or (_shape(opening[index]) is not None and _shape(row[index]) == _shape(opening[index]))
        for index in columns
    )


def _shape(cell: str) -> str | None:
    if cell.strip().isdigit():
        return "0"
    match = re.fullmatch(r"\S+(\.\w{2,4})", cell.strip())
    return match[1].lower() if match else None


def normalize_name(text: str) -> str:
    """Return the name of a column in lower case, without blanks around it and without marks such as `#1 `."""
    return re.sub(r"[\s-]+", "_", re.sub(r"^#\s*\d*\s*", "", text.strip())).lower()


def skip_header(lines: Sequence[Line]) -> list[Line]:
    """Return the lines without the first one if that has the names of columns."""
    is_header = bool(lines) and all(normalize_name(field) in _HEADER_NAMES for field in lines[0].fields)
    return list(lines[1:] if is_header else lines)


def split_of(path: Path) -> str:
    """Infer train, validation or test from the file name of a list; raise DatasetError if it names none or two."""
    splits = {split for part, split in _SPLITS if part in path.stem.lower()}
    if len(splits) != 1:
        raise DatasetError(f"{path}: the split cannot be inferred from the file name: name it train, val or test")
    return splits.pop()


def find_lists(folder: Path, names: Iterable[str], *, subfolders: Sequence[str] = ("",)) -> list[Path]:
    """Return the sorted files with these names in the first of the subfolders that contains any."""
    list_names = set(names)
    for subfolder in subfolders:
        if list_paths := [path for path in visible_files(folder / subfolder) if path.name in list_names]:
            return list_paths
    return []


def visible_files(folder: Path) -> list[Path]:
    """Return the sorted files of a folder, without hidden ones; [] if the folder does not exist."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if not is_hidden(path.name) and path.is_file())


def read_text(path: Path) -> str:
    """Read a text of any Unicode encoding, with line feeds as ends of lines."""
    try:
        data = path.read_bytes()
        text = decode_text(data)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as text: {error}") from error
    if is_lfs_pointer(data):
        raise DatasetError(f"{path}: {LFS_HINT}")
    if "\0" in text:
        raise DatasetError(
            f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1} holds a NUL byte: it is no text"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")
