"""Columns and files that no modality is read from, with the reason and what would make them readable."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..arrow import is_list
from ..media.files import TEXT_EXTENSIONS, is_array_path, kind_of_path
from .modalities import (
    LIST_HINT,
    FileChecks,
    Modality,
    base_name,
    holds_bytes,
    is_array,
    is_text,
    is_vector,
    is_written_list,
    text_values,
)

log = logging.getLogger("mmaudit")

_MIN_WORDS = 2  # per value, on average, of a text; ours
_MAX_KINDS = 6  # of files that are named one by one
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")  # pandas writes the index of a frame to Parquet under this name
_EXTENSION = re.compile(r"\.[a-z][a-z0-9]{0,9}")
_PICKLED = "files of pickled objects are never loaded: save the numbers with numpy.save, and name the .npy files"
_ARRAYS = "write the vectors to a Parquet column, or one .npy file per sample"
_REMEDIES = {
    **dict.fromkeys((".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt"), _PICKLED),
    **dict.fromkeys((".npz", ".h5", ".hdf5", ".mat", ".safetensors", ".parquet", ".arrow"), _ARRAYS),
    **dict.fromkeys((".csv", ".json", ".jsonl", ".tsv", ".xml", ".yaml"), "write their fields as columns of the table"),
    **dict.fromkeys(
        (".heic", ".heif", ".avif", ".svg", ".pdf", ".psd", ".dcm", ".nii"), "convert them to .png or .jpg"
    ),
    **dict.fromkeys((".wma", ".amr", ".mid", ".midi", ".sph"), "convert them to .wav or .flac"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".rar", ".7z"), "unpack them"),
}
_NAMED = "name them in a column of a metadata file: they are then read"


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRead:
    """A column, or a kind of file, that no modality is read from.

    Attributes:
        name: the column, several columns of scalars, or the files.
        form: type and shape of its values.
        remedy: why it is not read, and what would make it readable.
        is_minor: whether it is nothing that a modality could be read from: numbers, dates, codes, unknown files.
    """

    name: str
    form: str
    remedy: str
    is_minor: bool = False

    def __str__(self) -> str:
        return f"not read: {self.name} ({self.form}): {self.remedy}"


def find_not_read(
    sample: pa.Table, modalities: Sequence[Modality], *, roles: Collection[str], files: FileChecks
) -> tuple[NotRead, ...]:
    """Return the columns of some rows of a dataset that have no role and no modality, those of scalars in one entry."""
    used = {modality.column for modality in modalities} | set(roles)
    entries, scalars = [], []
    for field in sample.schema:
        if field.name in used or _PANDAS_INDEX.fullmatch(field.name):
            continue
        described = _describe(sample, field, files=files)
        if described is None:
            scalars.append(field.name)
        else:
            entries.append(NotRead(name=field.name, form=described[0], remedy=described[1]))
    if scalars:
        form, remedy = "numbers, dates or short texts", "no modality"
        entries.append(NotRead(name=", ".join(scalars), form=form, remedy=remedy, is_minor=True))
    return tuple(entries)


def files_not_read(paths: Iterable[str]) -> tuple[NotRead, ...]:
    """Return the files of a folder that are not media, by extension, the most frequent first."""
    by_extension: dict[str, list[str]] = {}
    for path in paths:
        by_extension.setdefault(PurePosixPath(path.lower()).suffix, []).append(path)
    ordered = sorted(by_extension.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    entries = []
    for extension, names in ordered[:_MAX_KINDS]:
        is_named = extension in TEXT_EXTENSIONS or is_array_path(extension)
        remedy = _NAMED if is_named else _REMEDIES.get(extension)
        name = f"*{extension}" if extension else "files without extension"
        form = f"{len(names)} files, such as {names[0]}" if len(names) > 1 else f"1 file, {names[0]}"
        entries.append(NotRead(name=name, form=form, remedy=remedy or "no media that are known", is_minor=not remedy))
    if rest := [name for _, names in ordered[_MAX_KINDS:] for name in names]:
        form = f"{len(rest)} files, such as {rest[0]}"
        entries.append(NotRead(name="other files", form=form, remedy="no media that are known", is_minor=True))
    return tuple(entries)


def log_not_read(entries: Iterable[NotRead]) -> None:
    """Log each entry on a line; as a warning, unless it is minor."""
    for entry in entries:
        log.log(logging.INFO if entry.is_minor else logging.WARNING, "%s", entry)


def log_forms(modalities: Iterable[Modality], sample: pa.Table) -> None:
    """Log what is read of cells that hold more than one medium, and warn of codes that are taken for texts."""
    for modality in modalities:
        if modality.kind == "image" and is_list(sample.schema.field(modality.column).type):
            name, column = modality.name, modality.column
            log.info(
                "%s: the first picture of each list is read; --modality %s=%s:frames reads all, as frames of a clip",
                *(column, name, column),
            )
    for message in code_warnings(sample, modalities):
        log.warning("%s", message)


def _describe(sample: pa.Table, field: pa.Field, *, files: FileChecks) -> tuple[str, str] | None:
    """Return form and remedy of a column without a modality; None for numbers, dates and short texts."""
    values = pc.drop_null(sample[field.name])
    if not len(values):
        return str(field.type), "null in all rows that were read"
    if is_text(field.type):
        return _describe_texts(field.name, text_values(sample, field), files=files)
    if is_list(field.type):
        return _describe_lists(field, values.to_pylist())
    if pa.types.is_struct(field.type):
        return _describe_struct(field.type)
    if holds_bytes(field.type):
        return _describe_bytes(field.name, bytes(values[0].as_py()))
    if pa.types.is_nested(field.type):
        return str(field.type), "write its parts as columns of their own"
    return None


def _describe_texts(column: str, values: Sequence[str], *, files: FileChecks) -> tuple[str, str] | None:
    if _most(is_written_list(value) for value in values):
        return f"lists written as text, such as {values[0][:40]}", LIST_HINT
    if _most(map(is_array_path, values)):
        shapes = [shape for shape in map(files.array_shape, filter(is_array_path, values)) if shape]
        return f".npy files, {_format_shapes(shapes)}", _array_remedy(column, shapes)
    if kinds := sorted({kind for kind in map(kind_of_path, values) if kind}):
        counts = Counter(map(kind_of_path, values))
        if 2 * (len(values) - counts[None]) >= len(values):
            return f"paths of {' and '.join(kinds)} files", "write one column for each kind"
    extension, votes = Counter(PurePosixPath(value.lower()).suffix for value in values).most_common(1)[0]
    if votes > len(values) / 2 and (extension in _REMEDIES or (_EXTENSION.fullmatch(extension) and _are_paths(values))):
        return f"paths of {extension} files", _REMEDIES.get(extension, "no media that are known")
    num_words = sum(len(value.split()) for value in values)
    if num_words >= _MIN_WORDS * len(values):
        return "text", _option(column, "text")
    return None


def _are_paths(values: Sequence[str]) -> bool:
    return _most("/" in value and " " not in value for value in values)


def _describe_lists(field: pa.Field, values: Sequence[Any]) -> tuple[str, str]:
    if is_array(field.type) and not is_vector(field.type):
        shapes = [_shape(value) for value in values]
        return f"{_format_type(field.type)}, {_format_shapes(shapes)}", _array_remedy(field.name, shapes)
    elements = [element for value in values for element in value if element is not None]
    if is_text(field.type.value_type):
        if kinds := {kind_of_path(element) for element in elements} - {None}:
            names = " and ".join(sorted(str(kind) for kind in kinds))
            return f"lists of {names} files", "write one file per row, or one column for each file"
        return "lists of strings", "join the strings of a row to one text"
    if holds_bytes(field.type.value_type):
        return _format_type(field.type), "of media in lists only pictures are read: write one medium per row"
    return _format_type(field.type), "write the parts of a row as columns of their own"


def _describe_struct(type_: pa.DataType) -> tuple[str, str]:
    names = [type_.field(index).name for index in range(type_.num_fields)]
    form = f"struct of {', '.join(names)}"
    if "bytes" in names:
        return form, "bytes and paths of no known medium: name the kind with --modality NAME=COLUMN:KIND"
    if "array" in names:
        return form, "sound needs its rate: add a field sampling_rate in Hz"
    if "path" in names:
        return form, "write the path as a column of strings"
    return form, "write its fields as columns of their own"


def _describe_bytes(column: str, first: bytes) -> tuple[str, str]:
    if first[:1] == b"\x80" and first[-1:] == b".":
        return "pickled objects", "pickled objects are never loaded: write numbers as lists"
    if first.startswith(b"\x93NUMPY"):
        return "bytes of .npy", "write the vectors as lists of numbers"
    return "bytes of no known medium", _option(column, "KIND")


def _array_remedy(column: str, shapes: Sequence[tuple[int, ...]]) -> str:
    if len(set(shapes)) == 1:
        return f"pool each to one vector, or {_option(column, 'features')}: all its numbers, row by row"
    return "pool each to one vector of the same length, for example its mean over time"


def _option(column: str, kind: str) -> str:
    return f"name all modalities, this one with --modality {base_name(column, default=kind)}={column}:{kind}"


def _shape(value: Any) -> tuple[int, ...]:
    sizes = []
    while isinstance(value, list):
        sizes.append(len(value))
        value = next((element for element in value if element is not None), None)
    return tuple(sizes)


def _format_shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    """Format shapes as 40 x 98, or as 40 x 12..98 where a size differs."""
    if not shapes or len({len(shape) for shape in shapes}) > 1:
        return "of several shapes" if shapes else "of unknown shape"
    ranges = [(min(sizes), max(sizes)) for sizes in zip(*shapes, strict=True)]
    return " x ".join(f"{low}" if low == high else f"{low}..{high}" for low, high in ranges)


def _format_type(type_: pa.DataType) -> str:
    """Format a type of lists as: lists of lists of float."""
    if is_list(type_):
        return f"lists of {_format_type(type_.value_type)}"
    return "structs" if pa.types.is_struct(type_) else str(type_)


def _most(flags: Iterable[bool]) -> bool:
    values = list(flags)
    return sum(values) > len(values) / 2


CODE_LENGTH = 16  # characters; ours: "Ses01F_impro01" of IEMOCAP has 14, IEO of CREMA-D 3
_MIN_CODES = 8  # values


def code_warnings(sample: pa.Table, modalities: Iterable[Modality]) -> Iterator[str]:
    """Yield a warning for each text column whose values look like codes, such as the ids of sentences or speakers.

    The rule is ours: nine tenths of the values are ASCII, without blanks and of at most 16 characters, and half of
    them occur more than once or hold a digit. A column called text or txt is taken at its word.
    """
    for modality in modalities:
        if modality.kind != "text" or modality.in_files or modality.column.lower() in ("text", "txt"):
            continue
        values = text_values(sample, sample.schema.field(modality.column))
        short = [
            value for value in values if value.isascii() and " " not in value.strip() and len(value) <= CODE_LENGTH
        ]
        count = Counter(short)
        num_codes = sum(count[value] > 1 or any(map(str.isdigit, value)) for value in short)
        if len(values) >= _MIN_CODES and len(short) >= 0.9 * len(values) and num_codes >= 0.5 * len(values):
            shown = ", ".join(sorted(count)[:3])
            yield (
                f"{modality.column} is read as text, but holds codes ({len(count)} different in {len(values)} rows, "
                f"such as {shown}): name the modalities without it, with --modality NAME=COLUMN[:KIND]"
            )
