"""Columns by role (id, label, group, split), and loading of their cells."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import ConfigError, DatasetError, Reason, UnusableError, choices
from ..hashing import digest
from ..media.files import (
    MAX_IN_MEMORY,
    MediaFile,
    Medium,
    is_hidden,
    kind_of_path,
    missing_file,
    require_fetched,
)
from ..storage import file_stamp, open_regular
from .modalities import Modality

_ROLE_NAMES = {
    "id": ("sample_id", "id", "uid", "key", "clip_id", "video_id", "__key__"),
    "label": ("label", "class", "category", "target", "y", "label_name", "labels", "cls"),
    "label_name": ("label_name", "class_name"),
    "group": ("group",),
    "split": ("split",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Column name of each role; `label` is required, the others may be None. `id`: columns that form the id, or ()."""

    id: tuple[str, ...]
    label: str
    label_name: str | None
    group: str | None
    split: str | None

    @property
    def names(self) -> list[str]:
        """Names of the columns that have a role; they are not modalities."""
        return [name for name in (*self.id, self.label, self.label_name, self.group, self.split) if name]


def find_columns(names: Sequence[str], requested: Mapping[str, str | None]) -> Columns:
    """Return the column of each role: the requested one, else the first usual name; "none" disables all but the label.

    The id may be composed of several columns, as `video_id,clip_id`.

    Raises DatasetError for repeated columns or a missing label, ConfigError for a requested column that does not exist.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DatasetError(f"more than one column is called {repeated[0]!r}: rename all but one")
    by_role = {role: _find_column(names, role, requested.get(role)) for role in _ROLE_NAMES if role != "id"}
    label = by_role["label"]
    if label is None:
        raise DatasetError(f"no label column among {', '.join(names)}: name it with --label COLUMN, or call it label")
    if label == "label_name" or requested.get("label") not in (None, "label"):
        by_role["label_name"] = None  # it names the classes of another label column
    return Columns(
        id=_find_id_columns(names, requested.get("id")),
        label=label,
        label_name=by_role["label_name"],
        group=by_role["group"],
        split=by_role["split"],
    )


def _find_id_columns(names: Sequence[str], requested: str | None) -> tuple[str, ...]:
    """Return the columns that form the id, () if there are none."""
    parts = [requested] if requested is None or requested in names else requested.split(",")
    columns = [_find_column(names, "id", part) for part in parts]
    return tuple(column for column in columns if column)


def compose_ids(rows: pa.Table, columns: Sequence[str]) -> list[str]:
    """Return the id of each row: the value of the column, or the values of several, joined by commas.

    In composed ids, commas and backslashes of the values are escaped, so that different values give different ids.
    """
    cells = [[str(value) for value in rows[column].to_pylist()] for column in columns]
    if len(cells) == 1:
        return cells[0]
    escaped = [[text.replace("\\", "\\\\").replace(",", "\\,") for text in texts] for texts in cells]
    return [",".join(values) for values in zip(*escaped, strict=True)]


def _find_column(names: Sequence[str], role: str, requested: str | None) -> str | None:
    if requested == "none" and role in ("id", "group", "split"):
        return None
    if requested is not None and requested not in names:
        raise ConfigError(f"--{role} {requested}: no such column; {choices(requested, names)}")
    return requested or next((name for name in _ROLE_NAMES[role] if name in names), None)


SPLIT = "split"  # the column that holds splits inferred from names of files, folders and dataset parts
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}


def with_split(rows: pa.Table, split: str | None) -> pa.Table:
    """Return the rows with a constant column `split`; unchanged if `split` is None."""
    if split is None:
        return rows
    return rows.append_column(SPLIT, pa.repeat(pa.scalar(split, pa.string()), rows.num_rows))


MAX_FOLDER_ENTRIES = 100_000  # files in a folder of frames: an hour at 25 frames a second has 90,000
_DIGITS = re.compile(r"(\d+)")


def null_error(column: str) -> UnusableError:
    """Return the error of a cell that is null: the only one for which a modality counts as missing in the source."""
    return UnusableError(Reason.MISSING, f"{column} is null")


def load_cell(cell: Any, modality: Modality, *, root: Path, allow_outside: bool) -> Any:
    """Load a cell: a medium, a text, a vector, or tuple[tuple[Medium, ...], ...] for frames.

    A medium is its bytes, or a MediaFile if it is large. Frames are the images of one or several folders, in order.
    Raises UnusableError if the medium is missing or not a regular file, DatasetError for a path outside `root` unless
    `allow_outside`.
    """
    if cell is None:
        raise null_error(modality.column)
    if modality.kind in ("features", "text"):
        return cell
    if modality.kind == "frames":
        folders = _folder_names(cell, modality.column)
        return tuple(_load_folder(folder, root=root, allow_outside=allow_outside) for folder in folders)
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell["bytes"] is not None else cell.get("path")
        if cell is None:
            raise UnusableError(Reason.MISSING, f"{modality.column} has neither bytes nor a path")
    if isinstance(cell, bytes):
        return require_fetched(cell, modality.column)
    path = _resolve(str(cell), root=root, allow_outside=allow_outside)
    if not path.exists():
        raise missing_file(root, str(cell))
    return require_fetched(_read_medium(path, str(cell)), str(cell))


def stamp_cell(
    cell: Any, modality: Modality, source_stamp: str | None, *, root: Path, allow_outside: bool
) -> str | None:
    """Return a digest of the paths, sizes and times of the files that a cell names; no file is opened.

    It changes when one of the files does. A cell without a path has the stamp of its source. None if a file is missing.
    Raises DatasetError as load_cell does.
    """
    if isinstance(cell, dict) and cell["bytes"] is None:
        cell = cell.get("path")
    if modality.kind in ("features", "text") or not isinstance(cell, str | list):
        return source_stamp
    try:
        if modality.kind == "frames":
            folders = _folder_names(cell, modality.column)
            names = [path for name in folders for path in _picture_paths(name, root=root, allow_outside=allow_outside)]
        else:
            names = [str(cell)]
        stamps = [file_stamp(_resolve(name, root=root, allow_outside=allow_outside)) for name in names]
    except UnusableError:
        return None
    return None if None in stamps else digest(repr((cell, stamps)).encode("utf-8", "surrogatepass"))


def holds_pictures(folder: str, *, root: Path) -> bool:
    """Return whether `folder` is a folder below `root` that contains images."""
    try:
        path = _resolve(folder, root=root, allow_outside=False)
        return path.is_dir() and bool(_pictures(path))
    except (DatasetError, UnusableError, OSError):
        return False


def _folder_names(cell: str | list[str | None], column: str) -> list[str]:
    """Return the folders of frames that a cell names; UnusableError if there is none, or a null."""
    folders = [cell] if isinstance(cell, str) else cell
    if not folders:
        raise UnusableError(Reason.MISSING, f"{column} names no folder")
    if None in folders:
        raise UnusableError(Reason.MISSING, f"{column} names a folder that is null")
    return folders  # type: ignore[return-value]


def _picture_paths(name: str, *, root: Path, allow_outside: bool) -> list[str]:
    """Return the paths of the images of a folder, in natural order; UnusableError if there is none."""
    folder = _resolve(name, root=root, allow_outside=allow_outside)
    if not folder.is_dir():
        raise UnusableError(Reason.MISSING, f"no folder {name}")
    try:
        pictures = _pictures(folder)
    except OSError as error:
        raise UnusableError(Reason.CORRUPT, f"{name}: {error.strerror}") from error
    if not pictures:
        raise UnusableError(Reason.EMPTY, f"no picture in the folder {name}")
    return [f"{name}/{picture}" for picture in pictures]


def _load_folder(name: str, *, root: Path, allow_outside: bool) -> tuple[Medium, ...]:
    media: list[Medium] = []
    max_bytes = MAX_IN_MEMORY  # for all images of a folder together: of a long folder only a few frames are decoded
    for path in _picture_paths(name, root=root, allow_outside=allow_outside):
        medium = _read_medium(_resolve(path, root=root, allow_outside=allow_outside), path, max_bytes=max_bytes)
        media.append(require_fetched(medium, path))
        max_bytes -= len(media[-1]) if isinstance(media[-1], bytes) else 0
    return tuple(media)


def _pictures(folder: Path) -> list[str]:
    """Return the image names of a folder in natural order: numbers compare as numbers, so frame 10 follows frame 9."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in islice(entries, MAX_FOLDER_ENTRIES + 1)]
    if len(names) > MAX_FOLDER_ENTRIES:
        raise UnusableError(Reason.TOO_LARGE, f"more than {MAX_FOLDER_ENTRIES:,} files in the folder {folder.name}")
    pictures = [name for name in names if kind_of_path(name) == "image" and not is_hidden(name)]
    return sorted(pictures, key=_natural_order)


def _natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = _DIGITS.split(name)  # text and numbers alternate, starting with text
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], name


def _resolve(name: str, *, root: Path, allow_outside: bool) -> Path:
    root_path = root.resolve()
    try:
        path = (root_path / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # circular links, or a NUL in the name
        raise UnusableError(Reason.MISSING, f"no file {name!r}: {error}") from error
    if not allow_outside and ("://" in name or not path.is_relative_to(root_path)):
        raise DatasetError(
            f"{name!r} leads outside {root}; make paths relative to the metadata, or pass --allow-outside"
        )
    return path


def _read_medium(path: Path, name: str, *, max_bytes: int = MAX_IN_MEMORY) -> Medium:
    """Read a regular file; one larger than `max_bytes` is returned as a MediaFile, which is read in ranges."""
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            return file.read(status.st_size) if status.st_size <= max_bytes else MediaFile.of(path, status)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UnusableError(Reason.MISSING, f"no file {name}") from error
    except OSError as error:
        raise UnusableError(Reason.CORRUPT, f"{name}: {error.strerror}") from error
