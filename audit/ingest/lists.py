"""Lists: what stands on each line of the files that come with a download?"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError

_SHOWN = 120  # characters of a line that a message repeats
_SPLITS = (("train", "train"), ("val", "validation"), ("dev", "validation"), ("test", "test"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line that is not blank, cut into its fields."""

    path: Path
    number: int
    text: str
    fields: tuple[str, ...]

    @property
    def where(self) -> str:
        """Say where the line stands."""
        return f"{self.path}, line {self.number}"

    def wrong(self, expected: str) -> DatasetError:
        """Give the error for a line that is not what was expected."""
        text = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
        return DatasetError(f"{self.where}: {text!r} is not {expected}: mend the line, or take the list anew")

    def number_at(self, index: int, *, expected: str) -> int:
        """Read a field as a whole number of 0 or more."""
        text = self.fields[index].strip()
        if not (text.isascii() and text.isdigit()):
            raise self.wrong(expected)
        return int(text)


def read_lines(path: Path, separator: str | None) -> list[Line]:
    """Read the lines of a text file, cut at `separator` (None: at white space)."""
    numbered = enumerate(_read_text(path).splitlines(), start=1)
    return [
        Line(path=path, number=number, text=text, fields=tuple(text.strip().split(separator)))
        for number, text in numbered
        if text.strip()
    ]


def read_csv(path: Path, *, delimiter: str = ",") -> list[Line]:
    """Read the records of a csv file; one that is quoted over several lines is named by its last."""
    reader = csv.reader(_read_text(path).splitlines(keepends=True), delimiter=delimiter, strict=True)
    lines = []
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                text = delimiter.join(fields)
                lines.append(Line(path=path, number=reader.line_num, text=text, fields=tuple(fields)))
    except csv.Error as error:
        raise DatasetError(f"{path}, line {reader.line_num}: {error}; mend the quoting there") from error
    return lines


def split_of(path: Path) -> str:
    """Read train, validation or test off a list's file name; DatasetError where it names none or two."""
    found = {split for part, split in _SPLITS if part in path.stem.lower()}
    if len(found) != 1:
        raise DatasetError(f"{path}: its name does not tell one split: call it train, val or test")
    return found.pop()


def find_lists(folder: Path, names: Iterable[str], *, below: Sequence[str] = ("",)) -> list[Path]:
    """Give the files of these names that lie in the folder, or in the first of `below` that holds any, sorted."""
    wanted = set(names)
    for place in below:
        found = sorted(path for path in (folder / place).glob("*") if path.name in wanted and path.is_file())
        if found:
            return found
    return []


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as text: {error}") from error
