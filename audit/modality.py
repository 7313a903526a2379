"""A modality: which column holds it, and what kind of thing stands there?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from .errors import ConfigError, DatasetError, choices

KINDS = ("audio", "image", "video", "frames", "features", "text")

_EXTENSIONS = {
    "audio": {".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac"},
    "image": {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"},
    "video": {".mp4", ".webm", ".mkv", ".avi", ".mov", ".mpg", ".mpeg", ".flv", ".m4v"},
}
_PATH_SUFFIXES = ("_file_name", "_filepath", "_file", "_path", "_filename")
RESERVED = ("all", "chance", "fused", "rest")
_NAMING = "name each with --modality NAME=COLUMN[:KIND]"
_TEXT_NAMES = {"text", "caption", "sentence", "transcript", "title", "review", "utterance", "question", "tweet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """One modality of a dataset. `length` is the number of entries of a feature vector, None for all other kinds.

    `encoder` says what makes vectors of it: see encode.py. Kind `frames` is a folder of pictures, or a list of such.
    """

    name: str
    column: str
    kind: str
    length: int | None = None
    encoder: str = "statistics"

    def __str__(self) -> str:
        """Write it as `--modality` takes it."""
        return f"{self.name}={self.column}:{self.kind}"


def kind_of_path(path: str) -> str | None:
    """Give the kind of medium that a file name's extension stands for: audio, image, video, or None."""
    extension = PurePosixPath(path.lower()).suffix
    return next((kind for kind, known in _EXTENSIONS.items() if extension in known), None)


def is_vector(type_: pa.DataType) -> bool:
    """Tell whether a column of this type holds one vector of numbers a row."""
    if not (pa.types.is_fixed_size_list(type_) or pa.types.is_list(type_) or pa.types.is_large_list(type_)):
        return False
    return bool(pa.types.is_floating(type_.value_type) or pa.types.is_integer(type_.value_type))


def is_text(type_: pa.DataType) -> bool:
    """Tell whether a column of this type holds strings."""
    if pa.types.is_dictionary(type_):
        return is_text(type_.value_type)
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def holds_bytes(type_: pa.DataType) -> bool:
    """Tell whether a column of this type holds media themselves: bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(type_):
        return bool(type_.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def infer_modalities(head: pa.Table, *, taken: Sequence[str]) -> list[Modality]:
    """Read the modalities off the columns of a dataset's first rows; a video column gives `audio` and `visual`.

    `taken` names columns that are something else: id, label, group, split.
    """
    found: list[Modality] = []
    for field in head.schema:
        if field.name in taken:
            continue
        kind = _infer_kind(head[field.name], field)
        if kind == "video":
            stem = _stem(field.name, default="")
            prefix = f"{stem}_" if stem and stem not in ("video", "clip") else ""
            found.append(Modality(name=f"{prefix}audio", column=field.name, kind="audio"))
            found.append(Modality(name=f"{prefix}visual", column=field.name, kind="video"))
        elif kind is not None:
            found.append(Modality(name=_stem(field.name, default=kind), column=field.name, kind=kind))
    return found


def parse_modality(text: str, head: pa.Table) -> Modality:
    """Read `NAME=COLUMN[:KIND]` against a dataset's first rows; ConfigError where a part of it does not exist."""
    name, equals, rest = text.partition("=")
    column, _, kind = rest.partition(":")
    if not (name and equals and column):
        raise ConfigError(f"--modality {text}: not of the form NAME=COLUMN[:KIND], such as audio=wav_path:audio")
    if column not in head.column_names:
        raise ConfigError(f"--modality {text}: no column {column!r}; {choices(column, head.column_names)}")
    if kind and kind not in KINDS:
        raise ConfigError(f"--modality {text}: no kind {kind!r}; {choices(kind, KINDS)}")
    inferred = _infer_kind(head[column], head.schema.field(column), eager=True)
    if not kind and inferred is None:
        raise ConfigError(f"--modality {text}: cannot tell what {column!r} holds; write {name}={column}:KIND")
    if not kind:
        kind = "audio" if inferred == "video" and name in ("audio", "sound") else str(inferred)
    _check_kind(text, kind, head.schema.field(column).type)
    return Modality(name=name, column=column, kind=kind)


def choose_encoders(modalities: Sequence[Modality], chosen: Sequence[str]) -> list[Modality]:
    """Set the encoders named by `NAME=ENCODER`; ConfigError for a modality that is not there."""
    names = [modality.name for modality in modalities]
    encoders = {}
    for text in chosen:
        name, equals, encoder = text.partition("=")
        if not (name and equals and encoder):
            raise ConfigError(f"--encoder {text}: not of the form MODALITY=ENCODER, such as audio=resnet18")
        if name not in names:
            raise ConfigError(f"--encoder {text}: no modality {name!r}; {choices(name, names)}")
        encoders[name] = encoder
    return [replace(modality, encoder=encoders.get(modality.name, modality.encoder)) for modality in modalities]


def check_modalities(modalities: Sequence[Modality], column_names: Sequence[str]) -> None:
    """Refuse fewer than two modalities, two of one name, and names that could not stand in a path."""
    names = [modality.name for modality in modalities]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"two modalities are called {repeated[0]!r}; {_NAMING}")
    if taken := next((name for name in names if name in RESERVED), None):
        raise ConfigError(f"a modality is called {taken!r}, which the reports call something else; {_NAMING}")
    if odd := next((name for name in names if set(name) & set("/\\:=")), None):
        # The name stands in paths of the cache and in `--between A:B`.
        raise ConfigError(f"a modality is called {odd!r}; its name may hold none of / \\ : = ; {_NAMING}")
    if len(modalities) < 2:
        found = f"only one modality, {modalities[0]}," if modalities else "no modality"
        raise DatasetError(
            f"found {found} among the columns {', '.join(column_names)}; a discrepancy needs two: "
            "name them with --modality NAME=COLUMN[:KIND]"
        )


def _check_kind(text: str, kind: str, type_: pa.DataType) -> None:
    fits: bool = {"features": is_vector(type_), "text": is_text(type_)}.get(kind, is_text(type_) or holds_bytes(type_))
    if not fits:
        raise ConfigError(f"--modality {text}: a column of type {type_} cannot be read as {kind}")


def _infer_kind(column: pa.ChunkedArray, field: pa.Field, *, eager: bool = False) -> str | None:
    """Guess a column's kind; `eager` takes strings that are no paths for text, whatever the column's name."""
    if is_vector(field.type):
        return "features"
    if not is_text(field.type):
        return None
    values = pc.drop_null(column).to_pylist()
    kinds = Counter(kind_of_path(value) for value in values)
    kind, most = next(iter(kinds.most_common(1)), (None, 0))
    if kind is not None and most > len(values) / 2:
        return kind  # odd ones among them are quarantined, each with its reason
    return "text" if values and kind is None and (eager or field.name.lower() in _TEXT_NAMES) else None


def _stem(column: str, *, default: str) -> str:
    """`image_file_name` is about `image`; `file_name` and `path` about nothing in particular."""
    for suffix in _PATH_SUFFIXES:
        if column.endswith(suffix) and len(column) > len(suffix):
            return column[: -len(suffix)]
    return default if column in ("file_name", "path", "file", "filename", "filepath") else column
