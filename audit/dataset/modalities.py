"""Modalities: the columns that hold them, and the kind of each."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ConfigError, DatasetError, choices
from .labels import declared_kind

# (offset, bytes there, kind); the first that fits counts
_SIGNATURES = (
    (0, b"fLaC", "audio"),
    (0, b"ID3", "audio"),
    (0, b"caff", "audio"),
    (0, b".snd", "audio"),
    (0, b"\x89PNG\r\n\x1a\n", "image"),
    (0, b"\xff\xd8\xff", "image"),
    (0, b"GIF87a", "image"),
    (0, b"GIF89a", "image"),
    (0, b"II*\0", "image"),
    (0, b"MM\0*", "image"),
    (0, b"\x1a\x45\xdf\xa3", "video"),  # matroska, webm
    (0, b"FLV\x01", "video"),
    (0, b"\x30\x26\xb2\x75", "video"),  # asf
    (0, b"\0\0\x01\xba", "video"),  # mpeg
    (0, b"\0\0\x01\xb3", "video"),
)
_RIFF = {b"WAVE": "audio", b"AVI ": "video", b"WEBP": "image"}
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # an mp4 by its box, a picture in it
NUM_BYTES = 64  # that suffice


def kind_of_bytes(data: bytes) -> str | None:
    """Give audio, image or video by the first bytes of a medium; None where they tell nothing."""
    if data[:4] in (b"RIFF", b"RF64"):
        return _RIFF.get(data[8:12])
    if data[:4] == b"FORM":
        return "audio" if data[8:12] in (b"AIFF", b"AIFC") else None
    if data[:4] == b"OggS":
        return "video" if b"\x80theora" in data[:NUM_BYTES] else "audio"
    if data[4:8] == b"ftyp":
        return _kind_of_brand(data[8:12])
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":  # bmp: the reserved four bytes, lest any text with BM fits
        return "image"
    if data[:2] in (b"P5", b"P6") and data[2:3].isspace():
        return "image"
    if data[:1] == b"\xff" and len(data) > 2 and data[1] & 0xE0 == 0xE0 and data[1] & 0x18 != 0x08:
        # The sync word of a frame of mp3 or aac without a tag before it; FF FE, of layer I, begins UTF-16.
        return "audio" if data[1] & 0x06 != 0x06 else None
    return next((kind for at, start, kind in _SIGNATURES if data[at : at + len(start)] == start), None)


def _kind_of_brand(brand: bytes) -> str | None:
    if brand in _PICTURE_BRANDS:
        return None  # no decoder for these here
    return "audio" if brand in (b"M4A ", b"M4B ", b"M4P ") else "video"


log = logging.getLogger("mmaudit")

KINDS = ("audio", "image", "video", "frames", "features", "text")

_EXTENSIONS = {
    "audio": {".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac"},
    "image": {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"},
    "video": {".mp4", ".webm", ".mkv", ".avi", ".mov", ".mpg", ".mpeg", ".flv", ".m4v"},
}
_PATH_SUFFIXES = ("_file_name", "_filepath", "_file", "_path", "_filename")
_FRAMES_SUFFIX = "_frames"
_MEMBER_EXTENSIONS = {".npy", ".txt"}.union(*_EXTENSIONS.values())
_MEDIA_TRIALS = 8  # cells that are looked into to see what they hold
_MAX_NAME = 100  # bytes of a modality's name, which stands in names of files and folders
RESERVED = ("all", "chance", "fused", "joint", "rest")
_NAMING = "name each with --modality NAME=COLUMN[:KIND]"
_TEXT_NAMES = {"text", "txt", "caption", "sentence", "transcript", "title", "review", "utterance", "question", "tweet"}


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


def holds_folders(type_: pa.DataType) -> bool:
    """Tell whether a column of this type may name folders: a string a row, or a list of them."""
    listed = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return is_text(type_.value_type if listed else type_)


def holds_files(head: pa.Table, field: pa.Field) -> bool:
    """Tell whether a column names files or folders of media, rather than holding them or something else."""
    return holds_folders(field.type) and _infer_kind(head, field, holds_pictures=no_pictures) not in (None, "text")


def no_pictures(folder: str) -> bool:
    """Know of no folder of pictures: what a folder holds is then not asked."""
    return False


def infer_modalities(
    head: pa.Table, *, taken: Sequence[str], holds_pictures: Callable[[str], bool] = no_pictures
) -> list[Modality]:
    """Read the modalities off the columns of a dataset's first rows; a video column gives `audio` and `visual`.

    Where another column has sound already, a video column gives its sight alone. `taken` names columns that are
    something else: id, label, group, split. `holds_pictures` tells whether a cell names a folder of pictures.
    """
    fields = [field for field in head.schema if field.name not in taken]
    kinds = {field.name: _infer_kind(head, field, holds_pictures=holds_pictures) for field in fields}
    has_sound = "audio" in kinds.values()
    videos = [name for name, kind in kinds.items() if kind == "video"]
    found: list[Modality] = []
    for name, kind in kinds.items():
        if kind == "video":
            prefix = _video_prefix(name, alone=has_sound and len(videos) == 1 and "visual" not in kinds)
            if not has_sound:
                found.append(Modality(name=f"{prefix}audio", column=name, kind="audio"))
            found.append(Modality(name=f"{prefix}visual", column=name, kind="video"))
        elif kind is not None:
            found.append(Modality(name=_stem(name, default=kind), column=name, kind=kind))
    if has_sound and videos:
        sound = next(name for name, kind in kinds.items() if kind == "audio")
        log.info("%s: the sight alone is read, since %s has the sound", ", ".join(videos), sound)
    return found


def parse_modality(text: str, head: pa.Table, *, holds_pictures: Callable[[str], bool] = no_pictures) -> Modality:
    """Read `NAME=COLUMN[:KIND]` against a dataset's first rows; ConfigError where a part of it does not exist."""
    name, equals, rest = text.partition("=")
    column, _, kind = rest.partition(":")
    if not (name and equals and column):
        raise ConfigError(f"--modality {text}: not of the form NAME=COLUMN[:KIND], such as audio=wav_path:audio")
    if column not in head.column_names:
        raise ConfigError(f"--modality {text}: no column {column!r}; {choices(column, head.column_names)}")
    if kind and kind not in KINDS:
        raise ConfigError(f"--modality {text}: no kind {kind!r}; {choices(kind, KINDS)}")
    inferred = _infer_kind(head, head.schema.field(column), eager=True, holds_pictures=holds_pictures)
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
    if odd := next((name for name in names if len(name.encode("utf-8", "replace")) > _MAX_NAME or "\0" in name), None):
        raise ConfigError(
            f"a modality is called {odd[:40]!r}; its name may have {_MAX_NAME} bytes, and no NUL; {_NAMING}"
        )
    if len(modalities) < 2:
        found = f"only one modality, {modalities[0]}," if modalities else "no modality"
        raise DatasetError(
            f"found {found} among the columns {', '.join(column_names)}; a discrepancy needs two: "
            "name them with --modality NAME=COLUMN[:KIND]"
        )


def _check_kind(text: str, kind: str, type_: pa.DataType) -> None:
    known = {"features": is_vector(type_), "text": is_text(type_), "frames": holds_folders(type_)}
    if not known.get(kind, is_text(type_) or holds_bytes(type_)):
        raise ConfigError(f"--modality {text}: a column of type {type_} cannot be read as {kind}")


def _infer_kind(
    head: pa.Table, field: pa.Field, *, eager: bool = False, holds_pictures: Callable[[str], bool]
) -> str | None:
    """Guess a column's kind; `eager` takes strings that are no paths for text, whatever the column's name."""
    if is_vector(field.type):
        return "features"
    if holds_bytes(field.type):
        # A column of a tar is called by its members' extension.
        stated = declared_kind(head.schema, field.name) or kind_of_path(f"x.{field.name}")
        return stated or _kind_of_media(pc.drop_null(head[field.name]))
    if not holds_folders(field.type):
        return None
    values = pc.drop_null(head[field.name]).to_pylist()
    if _names_folders(field.name, values, holds_pictures=holds_pictures):
        return "frames"
    if not is_text(field.type):
        return None
    kind, votes = _most(kind_of_path(value) for value in values)
    if kind is not None and votes > len(values) / 2:
        return kind  # odd ones among them are quarantined, each with its reason
    return "text" if values and kind is None and (eager or _names_text(field.name)) else None


def _kind_of_media(cells: pa.ChunkedArray) -> str | None:
    """Guess by the extensions of the paths beside the bytes, else by the first bytes themselves."""
    values = cells.slice(0, _MEDIA_TRIALS).to_pylist()
    parts = [value if isinstance(value, dict) else {"bytes": value} for value in values]
    named, votes = _most(kind_of_path(part.get("path") or "") for part in parts)
    if named is None:
        named, votes = _most(kind_of_bytes(part["bytes"] or b"") for part in parts)
    return named if votes > len(parts) / 2 else None


def _names_text(column: str) -> bool:
    return column.lower().removesuffix(".txt") in _TEXT_NAMES


def _most(kinds: Iterable[str | None]) -> tuple[str | None, int]:
    return next(iter(Counter(kinds).most_common(1)), (None, 0))


def _names_folders(column: str, values: Sequence[Any], *, holds_pictures: Callable[[str], bool]) -> bool:
    """Tell whether cells name folders: by the column's name (unless it counts frames), else by what lies there."""
    folders = [folder for value in values for folder in (value if isinstance(value, list) else [value]) if folder]
    if not folders or any(kind_of_path(folder) for folder in folders):
        return False
    if column.lower().endswith(_FRAMES_SUFFIX):
        return not all(folder.replace(".", "", 1).isdigit() for folder in folders)
    distinct = len(set(folders)) == len(folders)  # the name of a class may be that of a folder, too
    return distinct and any(holds_pictures(folder) for folder in folders[:_MEDIA_TRIALS])


def _video_prefix(column: str, *, alone: bool) -> str:
    """Give what precedes `audio` and `visual` in the names of a video column's modalities."""
    stem = _stem(column, default="")
    return "" if alone or stem in ("video", "clip", "") else f"{stem}_"


def _stem(column: str, *, default: str) -> str:
    """`image_file_name` and `image.png` are about `image`; `path` and `png` about nothing in particular."""
    for suffix in (*_PATH_SUFFIXES, *([_FRAMES_SUFFIX] if default == "frames" else [])):
        if column.endswith(suffix) and len(column) > len(suffix):
            return column[: -len(suffix)]
    name, _, extension = column.rpartition(".")  # a column of a tar is called by what follows the key
    if f".{extension}" in _MEMBER_EXTENSIONS:
        return name or default
    return default if column in ("file_name", "path", "file", "filename", "filepath") else column
