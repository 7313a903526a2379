"""Modalities: their columns and kinds, inferred from the data or parsed from options."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..arrow import is_list
from ..errors import ConfigError, DatasetError, choices
from ..media.files import EXTENSIONS, is_array_path, is_text_path, kind_of_bytes, kind_of_path
from .labels import declared_kind

log = logging.getLogger("mmaudit")

KINDS = ("audio", "image", "video", "frames", "features", "text")

_PATH_SUFFIXES = ("_file_name", "_filepath", "_file", "_path", "_filename", "_file_names", "_files", "_paths")
_FRAMES_SUFFIX = "_frames"
_MEMBER_EXTENSIONS = {**EXTENSIONS, "features": {".npy"}, "text": {".txt"}}
_NUM_MEDIA_CHECKS = 8  # cells whose content is inspected to infer a kind
_MAX_NAME_BYTES = 100  # of a modality's name, which is part of file and folder names
RESERVED = ("all", "chance", "fused", "joint", "rest")
_NAMING_HINT = "set the names with --modality NAME=COLUMN[:KIND]"
_TEXT_NAMES = {"text", "txt", "caption", "sentence", "transcript", "title", "review", "utterance", "question", "tweet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """One modality of a dataset.

    Attributes:
        name: unique name, used in columns and file names.
        column: the column that holds the media, their paths, texts or vectors.
        kind: one of KINDS; `frames` is a folder of images, a list of such folders, or a list of images in order. Of a
            list of images, `image` is the first.
        length: number of entries of a feature vector; None for all other kinds.
        encoder: name of the encoder; see encoders.py.
        in_files: whether the cells of a text are paths of the files that hold it.
    """

    name: str
    column: str
    kind: str
    length: int | None = None
    encoder: str = "statistics"
    in_files: bool = False

    @property
    def content_key(self) -> tuple[str, str]:
        """Column and form of the cells, equal for the audio and the frames of a video: they have the same content."""
        return self.column, "file" if self.kind in ("audio", "image", "video") else self.kind

    def __str__(self) -> str:
        """Return the modality in the format of `--modality`."""
        return f"{self.name}={self.column}:{self.kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChecks:
    """Checks of files that cells name; see cells.check_files. The defaults open no file.

    exists: whether there is such a file or folder. holds_pictures: whether a path is a folder of images. array_shape:
    shape of a .npy file, None if it is not readable.
    """

    exists: Callable[[str], bool] = lambda path: False
    holds_pictures: Callable[[str], bool] = lambda folder: False
    array_shape: Callable[[str], tuple[int, ...] | None] = lambda path: None


def is_vector(type_: pa.DataType) -> bool:
    """Return whether a column of this type holds one vector of numbers per row."""
    return is_list(type_) and _is_number(type_.value_type)


def is_array(type_: pa.DataType) -> bool:
    """Return whether a column of this type holds numbers in lists of any depth, vectors among them."""
    return is_list(type_) and (_is_number(type_.value_type) or is_array(type_.value_type))


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_floating(type_) or pa.types.is_integer(type_) or pa.types.is_boolean(type_))


def is_text(type_: pa.DataType) -> bool:
    """Return whether a column of this type holds strings."""
    if pa.types.is_dictionary(type_):
        return is_text(type_.value_type)
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def holds_bytes(type_: pa.DataType) -> bool:
    """Return whether a column of this type holds a medium per row: bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(type_):
        return bool(type_.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def holds_samples(type_: pa.DataType) -> bool:
    """Return whether a column of this type holds decoded sound: structs of `array` and `sampling_rate`."""
    if not pa.types.is_struct(type_) or min(map(type_.get_field_index, ("array", "sampling_rate"))) < 0:
        return False
    return is_array(type_.field("array").type)


def holds_media(type_: pa.DataType) -> bool:
    """Return whether the cells of a column of this type are media: encoded, decoded, or lists of encoded ones."""
    return holds_bytes(type_.value_type if is_list(type_) else type_) or holds_samples(type_)


def holds_folders(type_: pa.DataType) -> bool:
    """Return whether a column of this type can hold folder names: one string per row, or a list of strings."""
    return is_text(type_.value_type if is_list(type_) else type_)


def holds_files(rows: pa.Table, field: pa.Field) -> bool:
    """Return whether a column holds paths of files or folders."""
    kind = _infer_kind(rows, field, files=FileChecks()) if holds_folders(field.type) else None
    return kind is not None and (kind != "text" or _names_texts(rows, field))


def infer_modalities(sample: pa.Table, *, excluded: Sequence[str], files: FileChecks | None = None) -> list[Modality]:
    """Infer the modalities from the columns of some rows of a dataset; a video column becomes `audio` and `visual`.

    If another column holds audio, a video column becomes `visual` only. `excluded` lists the id, label, group and split
    columns.
    """
    fields = [field for field in sample.schema if field.name not in excluded]
    kinds = {field.name: _infer_kind(sample, field, files=files or FileChecks()) for field in fields}
    has_sound = "audio" in kinds.values()
    videos = [name for name, kind in kinds.items() if kind == "video"]
    modalities: list[Modality] = []
    for name, kind in kinds.items():
        if kind == "video":
            prefix = _name_prefix(name, alone=has_sound and len(videos) == 1 and "visual" not in kinds)
            if not has_sound:
                modalities.append(Modality(name=f"{prefix}audio", column=name, kind="audio"))
            modalities.append(Modality(name=f"{prefix}visual", column=name, kind="video"))
        elif kind is not None:
            in_files = kind == "text" and _names_texts(sample, sample.schema.field(name))
            modalities.append(Modality(name=base_name(name, default=kind), column=name, kind=kind, in_files=in_files))
    if has_sound and videos:
        sound = next(name for name, kind in kinds.items() if kind == "audio")
        log.info("%s: only the frames are read, since %s holds the audio", ", ".join(videos), sound)
    return modalities


def parse_modality(text: str, sample: pa.Table, *, files: FileChecks | None = None) -> Modality:
    """Parse `NAME=COLUMN[:KIND]`; ConfigError if the column or kind does not exist in some rows of a dataset."""
    name, separator, rest = text.partition("=")
    column, _, kind = rest.partition(":")
    if not (name and separator and column):
        raise ConfigError(f"--modality {text}: not of the form NAME=COLUMN[:KIND], such as audio=wav_path:audio")
    if column not in sample.column_names:
        raise ConfigError(f"--modality {text}: no column {column!r}; {choices(column, sample.column_names)}")
    if kind and kind not in KINDS:
        raise ConfigError(f"--modality {text}: no kind {kind!r}; {choices(kind, KINDS)}")
    field = sample.schema.field(column)
    inferred = _infer_kind(sample, field, eager=True, files=files or FileChecks())
    if not kind and inferred is None:
        raise ConfigError(f"--modality {text}: cannot infer the kind of {column!r}; write {name}={column}:KIND")
    if not kind:
        kind = "audio" if inferred == "video" and name in ("audio", "sound") else str(inferred)
    _check_kind(text, kind, sample, field)
    return Modality(name=name, column=column, kind=kind, in_files=kind == "text" and _names_texts(sample, field))


def choose_encoders(modalities: Sequence[Modality], requested: Sequence[str]) -> list[Modality]:
    """Set the encoders requested as `NAME=ENCODER`; ConfigError for a modality that does not exist."""
    names = [modality.name for modality in modalities]
    by_name = {}
    for text in requested:
        name, separator, encoder = text.partition("=")
        if not (name and separator and encoder):
            raise ConfigError(f"--encoder {text}: not of the form MODALITY=ENCODER, such as audio=resnet18")
        if name not in names:
            raise ConfigError(f"--encoder {text}: no modality {name!r}; {choices(name, names)}")
        by_name[name] = encoder
    return [replace(modality, encoder=by_name.get(modality.name, modality.encoder)) for modality in modalities]


def check_modalities(modalities: Sequence[Modality], column_names: Sequence[str]) -> None:
    """Raise DatasetError for fewer than two modalities, ConfigError for repeated, reserved or invalid names."""
    names = [modality.name for modality in modalities]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two modalities are called {repeated[0]!r}; {_NAMING_HINT}")
    if reserved_name := next((name for name in names if name in RESERVED), None):
        raise ConfigError(f"a modality is called {reserved_name!r}, a name reserved for the reports; {_NAMING_HINT}")
    if invalid := next((name for name in names if set(name) & set("/\\:=")), None):
        # The name is part of cache paths and of `--between A:B`.
        raise ConfigError(f"a modality is called {invalid!r}; its name must not contain / \\ : or = ; {_NAMING_HINT}")
    too_long = (name for name in names if len(name.encode("utf-8", "replace")) > _MAX_NAME_BYTES or "\0" in name)
    if invalid := next(too_long, None):
        raise ConfigError(
            f"a modality is called {invalid[:40]!r}; its name may have at most {_MAX_NAME_BYTES} bytes and no NUL; "
            f"{_NAMING_HINT}"
        )
    if len(modalities) < 2:
        problem = f"only one modality, {modalities[0]}," if modalities else "no modality"
        raise DatasetError(
            f"found {problem} among the columns {', '.join(column_names)}; a discrepancy needs two: "
            "define them with --modality NAME=COLUMN[:KIND]"
        )


def _check_kind(text: str, kind: str, sample: pa.Table, field: pa.Field) -> None:
    """Raise ConfigError unless a column can be read as a kind by its type, and is not of lists written as text."""
    type_ = field.type
    values = text_values(sample, field)
    names_arrays = _are_most(is_array_path, values)
    is_medium, is_media_list = is_text(type_) or holds_bytes(type_), is_list(type_) and holds_media(type_)
    compatible = {
        "audio": is_medium or holds_samples(type_),
        "image": is_medium or is_media_list or holds_folders(type_),
        "video": is_medium,
        "frames": is_media_list or holds_folders(type_),
        "features": is_array(type_) or names_arrays,
        "text": is_text(type_) and not names_arrays,
    }
    if not compatible[kind]:
        raise ConfigError(f"--modality {text}: a column of type {type_} cannot be read as {kind}")
    if _are_most(is_written_list, values):
        raise ConfigError(
            f"--modality {text}: the cells are lists written as text, such as {values[0][:60]}: {LIST_HINT}"
        )


LIST_HINT = "write lists to Parquet or JSON lines, and one path per cell to a csv file"
_WRITTEN_LIST = re.compile(
    r"""\s* (?: \[ \s* (?: ['"\[{\]+.\d-] | None | nan | array ) .* | \( \s* ['"+.\d-] .* , .* \) |
    (?: array | tensor ) \( .* \) | \{ \s* ['"] .* \} ) \s*""",
    re.DOTALL | re.VERBOSE,
)


def is_written_list(text: str) -> bool:
    """Return whether a text is a list, array or dictionary as Python, NumPy or pandas print it."""
    return _WRITTEN_LIST.fullmatch(text) is not None


def text_values(sample: pa.Table, field: pa.Field) -> list[str]:
    """Return the values of a column of strings that are not null; [] for a column of another type."""
    return pc.drop_null(sample[field.name]).to_pylist() if is_text(field.type) else []


def _names_texts(sample: pa.Table, field: pa.Field) -> bool:
    return _are_most(is_text_path, text_values(sample, field))


def _are_most(test: Callable[[str], bool], values: Sequence[str]) -> bool:
    return sum(map(test, values)) > len(values) / 2


def _infer_kind(sample: pa.Table, field: pa.Field, *, eager: bool = False, files: FileChecks) -> str | None:
    """Infer a column's kind; `eager` treats any strings that are not paths as text, whatever the column's name."""
    if is_vector(field.type):
        return "features"
    if holds_samples(field.type):
        return "audio"
    if holds_media(field.type):
        # Columns of a tar are named after the extension of their members.
        stated = declared_kind(sample.schema, field.name) or kind_of_path(f"x.{field.name}")
        kind = stated or _infer_media_kind(pc.drop_null(sample[field.name]))
        return None if is_list(field.type) and kind != "image" else kind
    if not holds_folders(field.type):
        return None
    values = pc.drop_null(sample[field.name]).to_pylist()
    if _holds_frame_folders(field.name, values, holds_pictures=files.holds_pictures):
        return "frames"
    if not is_text(field.type):
        first = [value[0] or "" for value in values if value]
        return "image" if _are_most(lambda path: kind_of_path(path) == "image", first) else None
    kind, votes = _most_common(kind_of_path(value) for value in values)
    if kind is not None and votes > len(values) / 2:
        return kind  # cells of another kind are quarantined later
    if _are_most(is_array_path, values):
        shapes = map(files.array_shape, filter(is_array_path, values))
        return "features" if all(shape is None or num_dimensions(shape) <= 1 for shape in shapes) else None
    if _are_most(is_text_path, values):
        return "text"
    is_text_name = field.name.lower().removesuffix(".txt") in _TEXT_NAMES
    is_words = bool(values) and kind is None and not _are_most(is_written_list, values)
    return "text" if is_words and (eager or is_text_name) else None


def num_dimensions(shape: Sequence[int]) -> int:
    """Return the number of dimensions of an array without those of size 1: (1, 768) is a vector."""
    return sum(size != 1 for size in shape)


def _infer_media_kind(cells: pa.ChunkedArray) -> str | None:
    """Infer the kind of media in memory by the extensions of their paths, else by their first bytes."""
    values = cells.slice(0, _NUM_MEDIA_CHECKS).to_pylist()
    values = [value[0] if isinstance(value, list) else value for value in values if value != []]
    media = [value if isinstance(value, dict) else {"bytes": value} for value in values]
    kind, votes = _most_common(kind_of_path(medium.get("path") or "") for medium in media)
    if kind is None:
        kind, votes = _most_common(kind_of_bytes(medium["bytes"] or b"") for medium in media)
    return kind if votes > len(media) / 2 else None


def _most_common(kinds: Iterable[str | None]) -> tuple[str | None, int]:
    return next(iter(Counter(kinds).most_common(1)), (None, 0))


def _holds_frame_folders(column: str, values: Sequence[Any], *, holds_pictures: Callable[[str], bool]) -> bool:
    """Return whether cells are folders of frames: by the column's name (unless it holds counts), else by content."""
    folders = [folder for value in values for folder in (value if isinstance(value, list) else [value]) if folder]
    if not folders or any(kind_of_path(folder) for folder in folders):
        return False
    if column.lower().endswith(_FRAMES_SUFFIX):
        return not all(folder.replace(".", "", 1).isdigit() for folder in folders)
    distinct = len(set(folders)) == len(folders)  # repeated values may be class names that coincide with folder names
    return distinct and any(holds_pictures(folder) for folder in folders[:_NUM_MEDIA_CHECKS])


def _name_prefix(column: str, *, alone: bool) -> str:
    """Return the prefix of `audio` and `visual` in the names of a video column's modalities."""
    stem = base_name(column, default="")
    return "" if alone or stem in ("video", "clip", "") else f"{stem}_"


def base_name(column: str, *, default: str) -> str:
    """Return the modality name in a column name: `image` of `image_file_name` and `image.png`, `default` of `path`."""
    for suffix in (*_PATH_SUFFIXES, *([_FRAMES_SUFFIX] if default == "frames" else [])):
        if column.endswith(suffix) and len(column) > len(suffix):
            return column[: -len(suffix)]
    name, _, extension = column.rpartition(".")  # columns of a tar: everything after the key
    if f".{extension}" in _MEMBER_EXTENSIONS.get(default, set().union(*_MEMBER_EXTENSIONS.values())):
        return name or default
    return default if column in ("file_name", "path", "file", "filename", "filepath") else column
