"""Adapter of image-text datasets: Food-101, MVSA, Twitter, Hateful Memes and lists of the same form."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dataset.formats.rows import numbered_lines, parse_line
from ..errors import DatasetError, choices
from .clips import Clip, Listing, list_clips, list_media, read_csv, split_of, unexpected_folder

_SUFFIXES = (".csv", ".tsv", ".jsonl")
_COLUMNS = {
    "image": ("image_file_name", "image", "img", "image_path", "img_path", "image_file", "image_name", "file_name",
              "filename", "path"),
    "text": ("text", "caption", "sentence", "title", "tweet", "description"),
    "label": ("label", "class", "category", "target", "gold_label", "y", "label_name"),
    "id": ("id", "uid", "sample_id", "key", "tweet_id"),
    "split": ("split", "partition", "subset"),
    "group": ("group",),
}  # fmt: skip
_PICTURES = ("images", "image", "img", "imgs", "data")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """One row of a list; `fields` by column name, None where the value is empty."""

    path: Path
    number: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.number}"


def read_image_text(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read csv, tsv and jsonl lists with common column names; paths are relative to the list or a folder images/.

    The split is the column `split`, else inferred from the names of the lists (train.jsonl, dev.jsonl, ...). A picture
    in several rows is their group, unless there is a column `group`.
    """
    list_paths = list(lists) or _find_lists(folder)
    records = [record for path in list_paths for record in _read_list(path)]
    columns = _columns(records, list_paths)
    files = list_media(folder, "", kind="image")
    picture_paths = [_picture_path(record, columns["image"], folder, frozenset(files)) for record in records]
    num_rows_of_picture = Counter(picture_paths)
    is_any_shared = any(num_rows > 1 for num_rows in num_rows_of_picture.values())
    splits = _splits(records, columns.get("split"), list_paths)
    clips = [
        Clip(
            id=_sample_id(record, columns.get("id"), picture_path, is_only_row=num_rows_of_picture[picture_path] == 1),
            label=_scalar(record, columns["label"]),
            group=_scalar(record, columns["group"]) if "group" in columns else picture_path if is_any_shared else None,
            split=split,
            media={"image_file_name": picture_path, "text": _scalar(record, columns["text"])},
            where=record.where,
        )
        for record, picture_path, split in zip(records, picture_paths, splits, strict=True)
    ]
    return list_clips(clips, media_files=files, notes=_unlabelled_notes(clips))


def _find_lists(folder: Path) -> list[Path]:
    list_paths = sorted(path for path in folder.glob("*") if path.suffix in _SUFFIXES and path.is_file())
    splits = ("train", "val", "dev", "test")
    split_lists = [path for path in list_paths if any(split in path.stem.lower() for split in splits)]
    selected = split_lists or list_paths
    if not selected:
        raise unexpected_folder(folder, "a set of pictures with texts", missing="list in .csv, .tsv or .jsonl")
    if len(selected) > 1 and not split_lists:
        names = ", ".join(path.name for path in list_paths)
        raise DatasetError(f"{folder} contains {names}: select one with --list")
    return selected


def _read_list(path: Path) -> list[_Record]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix not in _SUFFIXES:
        raise DatasetError(f"{path}: a list must be one of {', '.join(_SUFFIXES)}")
    lines = read_csv(path, delimiter="\t" if path.suffix == ".tsv" else ",")
    if not lines:
        return []
    header, records = lines[0].fields, []
    for line in lines[1:]:
        if len(line.fields) != len(header):
            raise line.error_expecting(f"a line of {len(header)} fields: {', '.join(header)}")
        fields = {name: value or None for name, value in zip(header, line.fields, strict=True)}
        records.append(_Record(path=path, number=line.number, fields=fields))
    return records


def _read_jsonl(path: Path) -> list[_Record]:
    try:
        parsed = [(number, parse_line(number, text)) for number, text in numbered_lines(path)]
        return [_Record(path=path, number=number, fields=fields) for number, fields in parsed]
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}, {error}") from error


def _columns(records: Sequence[_Record], lists: Sequence[Path]) -> dict[str, str]:
    """Return the column of each role, by name in order of preference; image, text and label are required."""
    names = list(dict.fromkeys(name for record in records for name in record.fields))
    available = {role: [name for name in usual if name in names] for role, usual in _COLUMNS.items()}
    column_of_role = {role: candidates[0] for role, candidates in available.items() if candidates}
    for role in ("image", "text", "label"):
        if role not in column_of_role:
            suggestions = " or ".join(_COLUMNS[role][:3])
            raise DatasetError(f"{lists[0]}: no column for the {role}: name it {suggestions}; {choices(role, names)}")
    return column_of_role


def _picture_path(record: _Record, column: str, folder: Path, files: frozenset[str]) -> str | None:
    """Return the path of a picture relative to the folder: as in the list, or in one of the usual subfolders."""
    name = _scalar(record, column)
    if name is None:
        return None
    root = folder.resolve()
    base_folders = [record.path.parent.resolve(), root]
    if ".." not in Path(name).parts:
        base_folders += [root / subfolder for subfolder in _PICTURES]
    candidates = [Path(os.path.normpath(base_folder / name)) for base_folder in base_folders]
    relative_paths = [path.relative_to(root).as_posix() for path in candidates if path.is_relative_to(root)]
    if "://" in name or not relative_paths:
        raise DatasetError(
            f"{record.where}: {name!r} leads outside {folder}: copy the pictures there and use paths relative to it"
        )
    return next((path for path in relative_paths if path in files), relative_paths[0])


def _splits(records: Sequence[_Record], column: str | None, lists: Sequence[Path]) -> list[str | None]:
    if column is not None:
        return [_named_split(record, column) for record in records]
    try:
        split_of_list = {path: split_of(path) for path in lists}
    except DatasetError:
        if len(lists) > 1:
            raise
        return [None] * len(records)  # a single list without splits
    return [split_of_list[record.path] for record in records]


def _named_split(record: _Record, column: str) -> str:
    try:
        return split_of(Path(_scalar(record, column) or ""))
    except DatasetError as error:
        value = record.fields.get(column)
        raise DatasetError(f"{record.where}: {column} is {value!r}: it must be train, val or test") from error


def _sample_id(record: _Record, column: str | None, picture_path: str | None, *, is_only_row: bool) -> str:
    if column is not None:
        name = _scalar(record, column)
        if name is None:
            raise DatasetError(f"{record.where}: {column} is empty: every row needs one")
        return name
    if picture_path is not None and is_only_row:
        return picture_path
    return f"{picture_path or 'row'}#{record.path.stem}-{record.number}"


def _scalar(record: _Record, column: str) -> str | None:
    value = record.fields.get(column)
    if isinstance(value, (list, dict)):
        raise DatasetError(f"{record.where}: {column} is {value!r}: it must be a single value")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or value == "" else str(value)


def _unlabelled_notes(clips: Sequence[Clip]) -> list[str]:
    count = sum(clip.label is None for clip in clips)
    return [f"{count:,} rows have no label"] if count else []
