"""Datasets of image and text: Food-101, MVSA, Twitter, Hateful Memes and lists like theirs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dataset.formats.text_rows import numbered_lines, parse_line
from ..errors import DatasetError, choices
from .clips import Clip, Listing, list_clips, media_below, read_csv, split_of, wrong_folder

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
    """One row of a list; `fields` by column name, null where the value is empty."""

    path: Path
    number: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.number}"


def read_image_text(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read csv, tsv and jsonl lists whose columns carry usual names; a path starts from the list or a folder images/.

    The split is the column of that name, else the lists' names (train.jsonl, dev.jsonl, ...) where each tells one. A
    picture that stands in several rows is their group, unless there is a column `group`.
    """
    found_lists = list(lists) or _find(folder)
    records = [record for path in found_lists for record in _read(path)]
    columns = _columns(records, found_lists)
    files = media_below(folder, "", kind="image")
    places = [_picture(record, columns["image"], folder, frozenset(files)) for record in records]
    count = Counter(places)
    shared = any(number > 1 for number in count.values())
    splits = _splits(records, columns.get("split"), found_lists)
    clips = [
        Clip(
            id=_id(record, columns.get("id"), place, alone=count[place] == 1),
            label=_scalar(record, columns["label"]),
            group=_scalar(record, columns["group"]) if "group" in columns else place if shared else None,
            split=split,
            media={"image_file_name": place, "text": _scalar(record, columns["text"])},
            where=record.where,
        )
        for record, place, split in zip(records, places, splits, strict=True)
    ]
    return list_clips(clips, found=files, notes=_unlabelled(clips))


def _find(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*") if path.suffix in _SUFFIXES and path.is_file())
    named = [path for path in found if any(part in path.stem.lower() for part in ("train", "val", "dev", "test"))]
    chosen = named or found
    if not chosen:
        raise wrong_folder(folder, "a set of pictures with texts", lacking="list in .csv, .tsv or .jsonl")
    if len(chosen) > 1 and not named:
        raise DatasetError(f"{folder} holds {', '.join(path.name for path in found)}: name one with --list")
    return chosen


def _read(path: Path) -> list[_Record]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix not in _SUFFIXES:
        raise DatasetError(f"{path} is none of {', '.join(_SUFFIXES)}")
    lines = read_csv(path, delimiter="\t" if path.suffix == ".tsv" else ",")
    if not lines:
        return []
    header = lines[0].fields
    for line in lines[1:]:
        if len(line.fields) != len(header):
            raise line.wrong(f"a line of {len(header)} fields: {', '.join(header)}")
    return [
        _Record(
            path=path,
            number=line.number,
            fields={name: value or None for name, value in zip(header, line.fields, strict=True)},
        )
        for line in lines[1:]
    ]


def _read_jsonl(path: Path) -> list[_Record]:
    try:
        return [
            _Record(path=path, number=number, fields=parse_line(number, text)) for number, text in numbered_lines(path)
        ]
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}, {error}") from error


def _columns(records: Sequence[_Record], lists: Sequence[Path]) -> dict[str, str]:
    """Find each role's column, by name and in the order of preference; image, text and label must be there."""
    names = list(dict.fromkeys(name for record in records for name in record.fields))
    found = {
        role: next(name for name in known if name in names)
        for role, known in _COLUMNS.items()
        if any(name in names for name in known)
    }
    for role in ("image", "text", "label"):
        if role not in found:
            called = " or ".join(_COLUMNS[role][:3])
            raise DatasetError(f"{lists[0]}: no column for the {role}: call it {called}; {choices(role, names)}")
    return found


def _picture(record: _Record, column: str, folder: Path, files: frozenset[str]) -> str | None:
    """Give a picture's path from the folder: as the list writes it, or below one of the usual folders."""
    name = _scalar(record, column)
    if name is None:
        return None
    root = folder.resolve()
    homes = [record.path.parent.resolve(), root]
    if ".." not in Path(name).parts:
        homes += [root / place for place in _PICTURES]
    tried = [Path(os.path.normpath(home / name)) for home in homes]
    inside = [path.relative_to(root).as_posix() for path in tried if path.is_relative_to(root)]
    if "://" in name or not inside:
        raise DatasetError(
            f"{record.where}: {name!r} leads outside {folder}: copy the pictures there, and write paths from it"
        )
    return next((path for path in inside if path in files), inside[0])


def _splits(records: Sequence[_Record], column: str | None, lists: Sequence[Path]) -> list[str | None]:
    if column is not None:
        return [_named_split(record, column) for record in records]
    try:
        known = {path: split_of(path) for path in lists}
    except DatasetError:
        if len(lists) > 1:
            raise
        return [None] * len(records)  # one list of everything
    return [known[record.path] for record in records]


def _named_split(record: _Record, column: str) -> str:
    try:
        return split_of(Path(_scalar(record, column) or ""))
    except DatasetError as error:
        value = record.fields.get(column)
        raise DatasetError(f"{record.where}: {column} is {value!r}: write train, val or test") from error


def _id(record: _Record, column: str | None, place: str | None, *, alone: bool) -> str:
    if column is not None:
        name = _scalar(record, column)
        if name is None:
            raise DatasetError(f"{record.where}: no {column}: give each row one")
        return name
    return place if place is not None and alone else f"{place or 'row'}#{record.path.stem}-{record.number}"


def _scalar(record: _Record, column: str) -> str | None:
    value = record.fields.get(column)
    if isinstance(value, (list, dict)):
        raise DatasetError(f"{record.where}: {column} is {value!r}: one value was expected")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or value == "" else str(value)


def _unlabelled(clips: Sequence[Clip]) -> list[str]:
    count = sum(clip.label is None for clip in clips)
    return [f"{count:,} rows have no label"] if count else []
