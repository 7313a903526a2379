"""Clips of a download: its lists, its tree of files, and repeated entries."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa

from ..dataset.modalities import kind_of_path
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


_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # a pointer of Git LFS is about 130 bytes
_NAMED = 6  # entries of a wrong folder that a message names


def media_below(root: Path, place: str, *, kind: str) -> list[str]:
    """Give the files of one kind in a folder and its subfolders, as POSIX paths from `root`, sorted."""
    found = []
    for folder, _, names in os.walk(root / place):
        here = Path(folder).relative_to(root)
        found += [(here / name).as_posix() for name in names if kind_of_path(name) == kind]
    return sorted(found)


def folders_in(root: Path, place: str) -> list[str]:
    """Give the subfolders of a folder, as POSIX paths from `root`, sorted; [] where there is no such folder."""
    if not (root / place).is_dir():
        return []
    with os.scandir(root / place) as entries:
        return sorted((PurePosixPath(place) / entry.name).as_posix() for entry in entries if entry.is_dir())


def by_stem(paths: Iterable[str]) -> dict[str, str]:
    """Index paths by their name without extension; of two of one name the first counts."""
    found: dict[str, str] = {}
    for path in paths:
        found.setdefault(PurePosixPath(path).stem, path)
    return found


def absence(path: Path) -> str | None:
    """Say why a file cannot be read as a medium, before it is opened; None where it is there."""
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return "not there"
        if size == 0:
            return "empty"
        if size < _POINTER_BYTES and path.read_bytes().startswith(_POINTER):
            return "Git LFS pointers (git lfs pull fetches the files)"
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    return None


def absence_of_frames(folder: Path) -> str | None:
    """Say why a folder cannot be read as frames; None where it holds a picture."""
    try:
        with os.scandir(folder) as entries:
            return None if any(kind_of_path(entry.name) == "image" for entry in entries) else "without pictures"
    except (OSError, ValueError):
        return "not there"


def wrong_folder(folder: Path, what: str, *, lacking: str) -> DatasetError:
    """Give the error for a folder that is not the download: what was expected there, and what lies there."""
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    found = ", ".join(names[:_NAMED]) + more if names else "nothing"
    return DatasetError(f"{folder} is not {what} as it unpacks: it has no {lacking}; it holds {found}")


PATH_SUFFIXES = ("_file_name", "_frames")  # of the columns that hold paths
Cell = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One row to be. `media` gives a path from the download's folder, several, or a text, for each media column.

    `more` holds columns that are no modality; `where` says which line named the clip.
    """

    id: str
    label: str | None
    media: Mapping[str, Cell]
    where: str
    group: str | None = None
    split: str | None = None
    more: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What an adapter found: a row for each clip that is listed, whether or not its media are there.

    Columns of `rows`: id, label, group and split where there are any, then the columns named by `media`: X_file_name
    holds a path, X_frames a folder or a list of folders, any other the medium itself. Paths start from the download's
    folder. `found` are the media that lie there; `official` is the number of clips in the dataset, where no list says.
    """

    rows: pa.Table
    media: tuple[str, ...]
    found: frozenset[str] = frozenset()
    official: int | None = None
    notes: tuple[str, ...] = ()


def list_clips(
    clips: Iterable[Clip], *, found: Iterable[str], official: int | None = None, notes: Sequence[str] = ()
) -> Listing:
    """Make rows of clips. A clip listed twice in the same words counts once; DatasetError where the words differ."""
    kept: dict[str, Clip] = {}
    repeated = 0
    for clip in clips:
        _check_inside(clip)
        first = kept.setdefault(clip.id, clip)
        if first is clip:
            continue
        if replace(clip, where=first.where) != first:
            raise DatasetError(
                f"clip {clip.id!r} is listed twice, differently: {first.where} and {clip.where}: keep one"
            )
        repeated += 1
    rows = list(kept.values())
    said = [f"{repeated:,} repeated lines count once"] if repeated else []
    return Listing(
        rows=_table(rows),
        media=tuple(rows[0].media) if rows else (),
        found=frozenset(found),
        official=official,
        notes=(*notes, *said),
    )


def _check_inside(clip: Clip) -> None:
    """Refuse a name in a list that would lead out of the download's folder."""
    for column, cell in clip.media.items():
        paths = [cell] if isinstance(cell, str) else cell or ()
        if column.endswith(PATH_SUFFIXES) and any(path.startswith("/") or ".." in path.split("/") for path in paths):
            raise DatasetError(f"{clip.where}: {paths[0]!r} leads out of the folder: mend the name there")


def _table(clips: Sequence[Clip]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "id": pa.array([clip.id for clip in clips], pa.string()),
        "label": pa.array([clip.label for clip in clips], pa.string()),
    }
    for name, values in (("group", [clip.group for clip in clips]), ("split", [clip.split for clip in clips])):
        if any(value is not None for value in values):
            columns[name] = pa.array(values, pa.string())
    if clips:
        columns |= {name: pa.array([clip.more[name] for clip in clips]) for name in clips[0].more}
        columns |= {name: pa.array([clip.media[name] for clip in clips]) for name in clips[0].media}
    return pa.table(columns)
