"""The tree: which media lie in a download's folder?"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import DatasetError
from ..source.modality import kind_of_path

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
