"""Media in the folder of a download, and the table of its clips."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

import pyarrow as pa

from ..errors import DatasetError
from ..media.files import is_hidden, is_lfs_pointer_file, kind_of_path

_POINTERS = "Git LFS pointers (git lfs pull fetches the files)"
_NUM_LISTED = 6  # entries of an unexpected folder that a message lists


def list_media(root: Path, subfolder: str, *, kind: str) -> list[str]:
    """Return the sorted files of one kind in a folder and its subfolders, as POSIX paths relative to `root`.

    Hidden files and folders, such as `._*` of macOS, are left out. DatasetError if a folder links to its parent.
    """
    return sorted(
        (folder / name).as_posix()
        for folder, _, names in _walk(root, subfolder)
        for name in names
        if kind_of_path(name) == kind
    )


def list_frame_folders(root: Path, subfolder: str) -> list[str]:
    """Return the sorted folders of pictures below a folder, as POSIX paths relative to `root`; empty ones, too.

    Folders of folders, such as those of classes and splits, are searched; a folder with pictures is not. DatasetError
    if a folder links to its parent.
    """
    frame_folders = []
    for folder, subfolders, names in _walk(root, subfolder):
        if any(kind_of_path(name) == "image" for name in names):
            subfolders.clear()
        if not subfolders and folder != PurePosixPath(subfolder):
            frame_folders.append(folder.as_posix())
    return sorted(frame_folders)


def _walk(root: Path, subfolder: str) -> Iterator[tuple[PurePosixPath, list[str], list[str]]]:
    """Yield the folders below a folder as os.walk does, relative to `root`, with links and without hidden entries."""
    for path, subfolders, names in os.walk(root / subfolder, followlinks=True):
        folder = PurePosixPath(Path(path).relative_to(root).as_posix())
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        for link in (Path(path, name) for name in subfolders if Path(path, name).is_symlink()):
            above = [Path(path), *(root / parent for parent in folder.parents)]
            if any(parent.resolve().is_relative_to(link.resolve()) for parent in above):
                raise DatasetError(f"the folder {link} links to one of its parents: remove this link")
        yield folder, subfolders, [name for name in names if not is_hidden(name)]


def event_ids(clips: Sequence[str], events: Sequence[str]) -> list[str]:
    """Return an id for each event of a clip: the clip's name, or CLIP:EVENT if the clip has several different ones."""
    num_events = Counter(clip for clip, _ in set(zip(clips, events, strict=True)))
    return [clip if num_events[clip] == 1 else f"{clip}:{event}" for clip, event in zip(clips, events, strict=True)]


def absence_of_file(path: Path) -> str | None:
    """Return the reason why a file cannot be read as a medium, checked without decoding it; None if it can."""
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return "not found"
        if size == 0:
            return "empty"
        if is_lfs_pointer_file(path):
            return _POINTERS
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    return None


def absence_of_frames(folder: Path) -> str | None:
    """Return the reason why a folder cannot be read as frames; None if it contains a picture."""
    try:
        with os.scandir(folder) as entries:
            pictures = (entry for entry in entries if kind_of_path(entry.name) == "image" and not is_hidden(entry.name))
            return "without pictures" if next(pictures, None) is None else None
    except (OSError, ValueError):
        return "not found"


def unexpected_folder(folder: Path, dataset: str, *, missing: str) -> DatasetError:
    """Return the error for a folder that is not the download: what is missing, and what it contains."""
    return DatasetError(f"{folder} is not {dataset} as unpacked: it has no {missing}; it contains {content_of(folder)}")


def content_of(folder: Path) -> str:
    """Return the first entries of a folder for a message, without hidden ones."""
    entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
    remainder = f" and {len(names) - _NUM_LISTED:,} more" if len(names) > _NUM_LISTED else ""
    return ", ".join(names[:_NUM_LISTED]) + remainder if names else "nothing"


PATH_SUFFIXES = ("_file_name", "_frames")  # of the columns that hold paths
Cell = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One row of the table. `media` maps media columns to a path relative to the download's folder, several, or a text.

    `extra_columns` holds columns that are not modalities; `where` is the line that lists the clip.
    """

    id: str
    label: str | None
    media: Mapping[str, Cell]
    where: str
    group: str | None = None
    split: str | None = None
    extra_columns: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Output of an adapter: a row for each listed clip, whether or not its media exist.

    Columns of `rows`: id, label, group and split if any, then the columns in `media`: X_file_name holds a path,
    X_frames a folder or a list of folders, any other column the medium itself. Paths are relative to the download's
    folder. `media_files` are the media in that folder; `official` is the number of clips of the dataset, where no list
    gives it; `spelling` says how media are called, for the error if none of them matches.
    """

    rows: pa.Table
    media: tuple[str, ...]
    media_files: frozenset[str] = frozenset()
    official: int | None = None
    notes: tuple[str, ...] = ()
    spelling: str = ""


class Adapter(Protocol):
    """A function that reads the download of one dataset as unpacked; packages add one by `mmaudit.downloads`.

    Args:
        folder: Folder of the download.
        lists: Lists to read instead of those in the folder; () reads those.

    Raises:
        DatasetError: The folder is not that dataset, or a list cannot be read.
    """

    def __call__(self, folder: Path, lists: Sequence[Path]) -> Listing:
        """Read the download."""


def list_clips(
    clips: Iterable[Clip],
    *,
    media_files: Iterable[str],
    spelling: str,
    official: int | None = None,
    notes: Sequence[str] = (),
) -> Listing:
    """Build the rows of clips. Identical entries count once; raise DatasetError if entries of one clip differ."""
    clip_of_id: dict[str, Clip] = {}
    num_repeated = 0
    for clip in clips:
        _check_inside(clip)
        first = clip_of_id.setdefault(clip.id, clip)
        if first is clip:
            continue
        if replace(clip, where=first.where) != first:
            raise DatasetError(f"clip {clip.id!r} has two different entries: {first.where} and {clip.where}: keep one")
        num_repeated += 1
    unique_clips = list(clip_of_id.values())
    repeated_notes = [f"{num_repeated:,} repeated lines were ignored"] if num_repeated else []
    return Listing(
        rows=_table(unique_clips),
        media=tuple(unique_clips[0].media) if unique_clips else (),
        media_files=frozenset(media_files),
        official=official,
        notes=(*notes, *repeated_notes),
        spelling=spelling,
    )


def cell_paths(cell: str | Sequence[str] | None) -> Sequence[str]:
    """Return the paths in a cell of a media column."""
    return [cell] if isinstance(cell, str) else cell or ()


def _check_inside(clip: Clip) -> None:
    """Raise DatasetError for a path that leads outside the download's folder."""
    for column, cell in clip.media.items():
        paths = cell_paths(cell)
        if column.endswith(PATH_SUFFIXES) and any(path.startswith("/") or ".." in path.split("/") for path in paths):
            raise DatasetError(f"{clip.where}: {paths[0]!r} leads outside the folder: correct the path in the list")


def _table(clips: Sequence[Clip]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "id": pa.array([clip.id for clip in clips], pa.string()),
        "label": pa.array([clip.label for clip in clips], pa.string()),
    }
    for name, values in (("group", [clip.group for clip in clips]), ("split", [clip.split for clip in clips])):
        if any(value is not None for value in values):
            columns[name] = pa.array(values, pa.string())
    if clips:
        columns |= {name: pa.array([clip.extra_columns[name] for clip in clips]) for name in clips[0].extra_columns}
        columns |= {name: pa.array([clip.media[name] for clip in clips]) for name in clips[0].media}
    return pa.table(columns)
