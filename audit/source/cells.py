"""A cell: which bytes, pictures or words does it stand for, and may they be read?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..quality import Reason, UnusableError
from .modality import Modality, kind_of_path

_DIGITS = re.compile(r"(\d+)")


def load_cell(cell: Any, modality: Modality, *, root: Path, allow_outside: bool) -> Any:
    """Give what a cell stands for: the bytes of a medium, a text, a vector, or of frames tuple[tuple[bytes, ...], ...].

    Frames are the pictures, in order, of one folder or of several. UnusableError when it is not there; DatasetError
    for a path that leads outside `root`, unless that is allowed.
    """
    if cell is None:
        raise UnusableError(Reason.MISSING, f"{modality.column} is null")
    if modality.kind in ("features", "text"):
        return cell
    if modality.kind == "frames":
        return _load_frames(cell, modality, root=root, allow_outside=allow_outside)
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell["bytes"] is not None else cell.get("path")
        if cell is None:
            raise UnusableError(Reason.MISSING, f"{modality.column} has neither bytes nor a path")
    if isinstance(cell, bytes):
        return cell
    return _read(_resolve(str(cell), root=root, allow_outside=allow_outside), str(cell))


def holds_pictures(folder: str, *, root: Path) -> bool:
    """Tell whether a cell names a folder of pictures below `root`."""
    try:
        path = _resolve(folder, root=root, allow_outside=False)
        return path.is_dir() and bool(_pictures(path))
    except (DatasetError, UnusableError, OSError):
        return False


def _load_frames(cell: Any, modality: Modality, *, root: Path, allow_outside: bool) -> tuple[tuple[bytes, ...], ...]:
    folders = [cell] if isinstance(cell, str) else list(cell)
    if not folders:
        raise UnusableError(Reason.MISSING, f"{modality.column} names no folder")
    if any(folder is None for folder in folders):
        raise UnusableError(Reason.MISSING, f"{modality.column} names a folder that is null")
    return tuple(_load_folder(folder, root=root, allow_outside=allow_outside) for folder in folders)


def _load_folder(name: str, *, root: Path, allow_outside: bool) -> tuple[bytes, ...]:
    folder = _resolve(name, root=root, allow_outside=allow_outside)
    if not folder.is_dir():
        raise UnusableError(Reason.MISSING, f"no folder {name}")
    try:
        pictures = _pictures(folder)
    except OSError as error:
        raise UnusableError(Reason.CORRUPT, f"{name}: {error.strerror}") from error
    if not pictures:
        raise UnusableError(Reason.EMPTY, f"no picture in the folder {name}")
    paths = [f"{name}/{picture}" for picture in pictures]
    return tuple(_read(_resolve(path, root=root, allow_outside=allow_outside), path) for path in paths)


def _pictures(folder: Path) -> list[str]:
    """Name the pictures of a folder in order: by name, numbers as numbers, so that frame 10 comes after frame 9."""
    names = [each.name for each in folder.iterdir() if kind_of_path(each.name) == "image"]
    return sorted((name for name in names if not name.startswith(".")), key=_in_order)


def _in_order(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = _DIGITS.split(name)  # words and numbers take turns, words first
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], name


def _resolve(name: str, *, root: Path, allow_outside: bool) -> Path:
    root_path = root.resolve()
    try:
        path = (root_path / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL in the name
        raise UnusableError(Reason.MISSING, f"no file {name!r}: {error}") from error
    if not allow_outside and ("://" in name or not path.is_relative_to(root_path)):
        raise DatasetError(
            f"{name!r} leads outside {root}; make paths relative to the metadata, or pass --allow-outside"
        )
    return path


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UnusableError(Reason.MISSING, f"no file {name}") from error
    except OSError as error:
        raise UnusableError(Reason.CORRUPT, f"{name}: {error.strerror}") from error
