"""Adapter of image-text datasets: Food-101, Twitter-2015, Hateful Memes and lists of the same form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dataset.formats.rows import parse_line
from ..errors import DatasetError, choices
from .clips import Clip, Listing, list_clips, list_media, unexpected_folder
from .lists import Line, normalize_name, read_list, read_text, split_of, visible_files
from .mvsa import LABELS_FILE
from .names import PictureIndex

_SUFFIXES = (".csv", ".tsv", ".jsonl")
_TEXT_SUFFIX = ".txt"  # of a list that is passed, not of one that is searched for: texts have it, too
_LIST_FOLDERS = ("", "texts", "text", "annotations", "lists")
_COLUMNS = {
    "image": ("image_file_name", "image", "img", "image_path", "img_path", "image_file", "image_name", "file_name",
              "filename", "path", "imageid", "image_id"),
    "text": ("text", "caption", "sentence", "title", "tweet", "description", "string"),
    "label": ("label", "class", "category", "target", "gold_label", "y", "label_name"),
    "id": ("id", "uid", "sample_id", "key", "tweet_id"),
    "split": ("split", "partition", "subset"),
    "group": ("group",),
}  # fmt: skip
_REQUIRED = ("image", "text", "label")
# The columns of Twitter-2015 and Twitter-2017 in the lists of TomBERT; their test.tsv does not name the label.
_TWITTER = ("index", "label", "imageid", "string", "string")
_TWITTER_TEST = ("index", "imageid", "string", "string")


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
    """Read csv, tsv and jsonl lists with common column names, or without a header where the columns can be inferred.

    Paths are relative to the list or a folder images/; a name alone, with or without extension, is searched for below
    the folder. The split is the column `split`, else inferred from the names of the lists (train.jsonl, dev.jsonl,
    ...). A picture in several rows is their group, unless there is a column `group`.
    """
    list_paths = list(lists) or _find_lists(folder)
    files = list_media(folder, "", kind="image")
    records, notes = _read_records(list_paths, PictureIndex(folder, files))
    columns = _columns(records, list_paths)
    splits = _splits(records, columns.get("split"), list_paths)
    labels = [_scalar(record, columns["label"]) for record in records]
    index = PictureIndex(folder, files, labels={label for label in labels if label is not None})
    picture_paths = [
        index.find(name, list_path=record.path, where=record.where, split=split, label=label)
        if (name := _scalar(record, columns["image"])) is not None
        else None
        for record, split, label in zip(records, splits, labels, strict=True)
    ]
    num_rows_of_picture = Counter(picture_paths)
    is_any_shared = any(num_rows > 1 for num_rows in num_rows_of_picture.values())
    clips = [
        Clip(
            id=_sample_id(record, columns.get("id"), picture_path, is_only_row=num_rows_of_picture[picture_path] == 1),
            label=label,
            group=_scalar(record, columns["group"]) if "group" in columns else picture_path if is_any_shared else None,
            split=split,
            media={"image_file_name": picture_path, "text": _text(record, columns["text"])},
            where=record.where,
        )
        for record, picture_path, split, label in zip(records, picture_paths, splits, labels, strict=True)
    ]
    spelling = f"pictures at the paths in column {columns['image']!r}, or of these names anywhere below"
    return list_clips(clips, media_files=files, notes=(*notes, *_unlabelled_notes(clips)), spelling=spelling)


def _find_lists(folder: Path) -> list[Path]:
    paths = (visible_files(folder / name) for name in _LIST_FOLDERS)
    candidates = ([path for path in files if path.suffix.lower() in _SUFFIXES] for files in paths)
    list_paths = next((files for files in candidates if files), [])
    splits = ("train", "val", "dev", "test")
    split_lists = [path for path in list_paths if any(split in path.stem.lower() for split in splits)]
    selected = split_lists or list_paths
    if not selected:
        hint = f" ({LABELS_FILE} is read by: mmaudit ingest mvsa)" if (folder / LABELS_FILE).is_file() else ""
        missing = f"list in .csv, .tsv or .jsonl{hint}"
        raise unexpected_folder(folder, "a set of pictures with texts", missing=missing)
    if len(selected) > 1 and not split_lists:
        names = ", ".join(path.name for path in list_paths)
        raise DatasetError(f"{folder} contains {names}: select one with --list")
    return selected


def _read_records(list_paths: Sequence[Path], index: PictureIndex) -> tuple[list[_Record], list[str]]:
    """Read the rows of all lists; the columns of those without a header are inferred together."""
    tables: dict[Path, list[Line]] = {}
    records, notes = [], []
    for path in list_paths:
        if path.suffix.lower() == ".jsonl":
            records += _read_jsonl(path)
        elif path.suffix.lower() in (*_SUFFIXES, _TEXT_SUFFIX):
            tables[path] = read_list(path, ",;\t|" if path.suffix.lower() == ".csv" else "\t,;|")
        else:
            raise DatasetError(f"{path}: a list must be one of {', '.join((*_SUFFIXES, _TEXT_SUFFIX))}")
    headerless = {path: lines for path, lines in tables.items() if lines and _has_no_header(lines, index)}
    inferred = _infer_columns([line for lines in headerless.values() for line in lines], index) if headerless else ()
    for path, lines in tables.items():
        if path in headerless:
            records += _rows(lines, inferred)
            notes.append(f"{path.name} has no header: its columns are read as {', '.join(inferred)}")
        elif lines:
            records += _rows(lines[1:], _header(lines))
    return records, notes


def _has_no_header(lines: Sequence[Line], index: PictureIndex) -> bool:
    """Return whether the first line holds the name of a picture and no name of a column."""
    names = [normalize_name(name) for name in lines[0].fields]
    usual = {name for role in _COLUMNS.values() for name in role}
    return not usual.intersection(names) and any(index.is_picture(field) for field in lines[0].fields)


def _infer_columns(lines: Sequence[Line], index: PictureIndex) -> tuple[str, ...]:
    """Return the columns of lists without a header; DatasetError unless they are an image, a text and a label."""
    first = lines[0]
    mend = "write the names of the columns into a first line, such as image,text,label"
    if odd := next((line for line in lines if len(line.fields) != len(first.fields)), None):
        raise odd.error_expecting(f"a line of {len(first.fields)} fields as in line {first.number}")
    cells = list(zip(*(line.fields for line in lines), strict=True))
    images = [number for number, column in enumerate(cells) if all(map(index.is_picture, column))]
    remaining = [number for number in range(len(cells)) if number not in images]
    if len(images) != 1 or len(remaining) != 2:
        raise DatasetError(f"{first.path} has no header, and its {len(cells)} columns cannot be inferred: {mend}")
    num_values = {number: len(set(cells[number])) for number in remaining}
    stems = [Path(name).stem.lower() for name in cells[images[0]]]
    prefixes = [
        number
        for number in remaining
        if all(stem.startswith(cell.strip().lower()) for stem, cell in zip(stems, cells[number], strict=True))
    ]
    labels = [number for number in remaining if num_values[number] < max(num_values.values())] or prefixes
    if len(labels) != 1:
        raise DatasetError(f"{first.path} has no header, and which column is the label cannot be inferred: {mend}")
    return tuple("image" if n == images[0] else "label" if n == labels[0] else "text" for n in range(len(cells)))


def _header(lines: Sequence[Line]) -> tuple[str, ...]:
    """Return the names of the columns, a repeated one with a number."""
    header = tuple(name.strip() for name in lines[0].fields)
    widths = {len(line.fields) for line in lines[1:]}
    normal = tuple(map(normalize_name, header))
    if normal == _TWITTER or (normal == _TWITTER_TEST and widths == {len(_TWITTER)}):
        header = _TWITTER
    elif len(lines) > 2 and len(widths) == 1 and widths != {len(header)}:
        raise DatasetError(
            f"{lines[0].where}: the header names {len(header)} columns, {', '.join(header)}, and every row has "
            f"{widths.pop()} fields: correct the header"
        )
    names: list[str] = []
    for name in header:
        names.append(name if name not in names else f"{name}_{names.count(name) + 1}")
    return tuple(names)


def _rows(lines: Sequence[Line], header: Sequence[str]) -> list[_Record]:
    records = []
    for line in lines:
        if len(line.fields) != len(header):
            raise line.error_expecting(f"a line of {len(header)} fields: {', '.join(header)}")
        fields = {name: value or None for name, value in zip(header, line.fields, strict=True)}
        records.append(_Record(path=line.path, number=line.number, fields=fields))
    return records


def _read_jsonl(path: Path) -> list[_Record]:
    numbered = enumerate(read_text(path).split("\n"), start=1)
    try:
        parsed = [(number, parse_line(number, text.strip().encode())) for number, text in numbered if text.strip()]
    except ValueError as error:
        raise DatasetError(f"{path}, {error}") from error
    return [_Record(path=path, number=number, fields=fields) for number, fields in parsed]


def _columns(records: Sequence[_Record], lists: Sequence[Path]) -> dict[str, str]:
    """Return the column of each role, by name in order of preference; image, text and label are required."""
    names = list(dict.fromkeys(name for record in records for name in record.fields))
    column_of_name = {normalize_name(name): name for name in reversed(names)} | {name: name for name in names}
    available = {role: [name for name in usual if name in column_of_name] for role, usual in _COLUMNS.items()}
    column_of_role = {role: column_of_name[candidates[0]] for role, candidates in available.items() if candidates}
    for role in _REQUIRED:
        if role not in column_of_role:
            suggestions = " or ".join(_COLUMNS[role][:3])
            raise DatasetError(f"{lists[0]}: no column for the {role}: name it {suggestions}; {choices(role, names)}")
    return column_of_role


def _text(record: _Record, column: str) -> str | None:
    """Return the text; in the lists of TomBERT the sentence with a mark $T$, and after it the target that it marks."""
    text, target = record.fields.get(column), record.fields.get("string_2") if column == "string" else None
    if not isinstance(text, str) or not text.strip():
        text = _scalar(record, column)
    return text if text is None or target is None else f"{text} {target}"


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
    return None if value is None else str(value).strip() or None


def _unlabelled_notes(clips: Sequence[Clip]) -> list[str]:
    count = sum(clip.label is None for clip in clips)
    return [f"{count:,} rows have no label"] if count else []
