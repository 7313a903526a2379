"""Folders of media without a table: split, class, modality and sample are inferred from the paths."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa

from ...errors import DatasetError
from ...media.files import is_hidden, kind_of_path
from ...remote.paths import AnyPath, RemotePath, source_path
from ..columns import SPLIT
from ..not_read import files_not_read
from . import Plan
from .sources import divide, split_of_name
from .tables import OTHER_FORMS, plan_rows

log = logging.getLogger("mmaudit")

# A folder whose name contains one of these words stands for a modality, not for a class
_MODALITY_WORDS = ("audio", "sound", "wav", "speech", "image", "img", "picture", "photo", "video", "visual", "frame")
_FRAMES = "frames"  # the kind of a folder of pictures
_METADATA_HINT = (
    "or write a metadata.csv with a column file_name (or NAME_file_name for each modality) and a column label"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutFile:
    """One media file of a folder layout: its path below the root, and what its parent folders stand for."""

    path: str
    kind: str
    folder: str | None  # of its modality, if folders stand for modalities
    split: str | None
    class_path: str  # the path without modality, split and extension: class/.../stem

    @property
    def sample_id(self) -> str:
        """The path without modality and extension, shared by all files of one sample."""
        return f"{self.split}/{self.class_path}" if self.split else self.class_path


def plan_folders(data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
    """Plan a folder ROOT[/split]/class/file, one sample per file stem; None if it is empty, DatasetError without media.

    Files whose paths differ only in the extension are one sample: train/dog/1.wav and train/dog/1.png. If the first
    folders are named after modalities, so are audio/dog/1.wav and image/dog/1.png.
    """
    root = source_path(data)
    paths = list(_iter_files(root, allow_outside=allow_outside)) if root.is_dir() else []
    media = [path for path in paths if kind_of_path(path) is not None]
    if not media:
        if paths:
            raise DatasetError(
                f"{root} has {len(paths)} files, such as {paths[0]}, but no audio, image or video: "
                f"use a folder of media, {_METADATA_HINT}; {OTHER_FORMS}"
            )
        return None
    rows = _sample_rows(root, _join_frames(_parse_paths(media)))
    log.info("%s: files of one name form a sample, their folder is the label", root)
    not_read = files_not_read(path for path in paths if kind_of_path(path) is None)
    return plan_rows(root, rows, shard_rows=shard_rows, not_read=not_read)


def _iter_files(root: AnyPath, *, allow_outside: bool) -> Iterator[str]:
    """Yield the paths of all files below the root, sorted, without hidden ones; DatasetError for links outside it."""
    if isinstance(root, RemotePath):
        yield from sorted((path for path in root.find() if not is_hidden(path)), key=lambda path: path.split("/"))
        return
    resolved_root = root.resolve()

    def walk(folder: Path, parents: tuple[Path, ...]) -> Iterator[str]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            if not Path(entry.path).is_dir():
                yield Path(entry.path).relative_to(root).as_posix()
                continue
            target = Path(entry.path).resolve()
            if not allow_outside and not target.is_relative_to(resolved_root):
                raise DatasetError(f"the folder {entry.path} leads outside {root}: move it, or pass --allow-outside")
            if target in parents:
                raise DatasetError(f"the folder {entry.path} links to one of its parents: remove this link")
            yield from walk(Path(entry.path), (*parents, target))

    yield from walk(root, (resolved_root,))


def _parse_paths(paths: Sequence[str]) -> list[LayoutFile]:
    """Parse the parent folders of each file: a level is splits or modalities only if all of its folders are."""
    parts = [PurePosixPath(path).with_suffix("").parts for path in paths]
    kinds = [str(kind_of_path(path)) for path in paths]
    folders: list[str | None] = [None] * len(paths)
    splits: list[str | None] = [None] * len(paths)
    for _ in range(2):  # audio/train/dog/1.wav and train/audio/dog/1.wav
        tops = [part[0] if len(part) > 1 else "" for part in parts]
        if not any(splits) and all(split_of_name(top) for top in tops):
            splits = list(tops)
        elif not any(folders) and _are_modality_folders(tops, kinds):
            folders = list(tops)
        else:
            break
        parts = [part[1:] for part in parts]
    return [
        LayoutFile(path=path, kind=kind, folder=folder, split=split, class_path="/".join(part))
        for path, kind, folder, split, part in zip(paths, kinds, folders, splits, parts, strict=True)
    ]


def _are_modality_folders(tops: Sequence[str], kinds: Sequence[str]) -> bool:
    """Return whether folders are modalities: each has a modality's name and one kind of media, and kinds differ."""
    pairs = set(zip(tops, kinds, strict=True))
    names = {top for top, _ in pairs}
    # Folders of one kind are classes, such as cat_video and dog_video.
    are_named = all(any(word in name.lower() for word in _MODALITY_WORDS) for name in names)
    return len(set(kinds)) > 1 and len(pairs) == len(names) and are_named


def _join_frames(files: Sequence[LayoutFile]) -> list[LayoutFile]:
    """Replace the pictures of a folder by the folder, if its sample has a file: dog/1/0001.jpg beside dog/1.wav."""
    samples = {file.sample_id for file in files if file.kind != "image"}
    joined: dict[tuple[str, str | None], LayoutFile] = {}
    for file in files:
        class_path = PurePosixPath(file.class_path).parent.as_posix()
        clip = replace(file, path=PurePosixPath(file.path).parent.as_posix(), kind=_FRAMES, class_path=class_path)
        is_frame = file.kind == "image" and clip.sample_id in samples
        joined.setdefault((clip.path, file.folder) if is_frame else (file.path, None), clip if is_frame else file)
    if num_folders := sum(file.kind == _FRAMES for file in joined.values()):
        log.info("%d folders of pictures are the frames of the samples that they are named after", num_folders)
    return list(joined.values())


def _sample_rows(root: AnyPath, files: Sequence[LayoutFile]) -> pa.Table:
    """Return one row per sample: id, label, split, and a column of paths for each modality."""
    column_of = _column_names(files)
    paths_by_sample: dict[str, dict[str, str]] = {}
    for file in files:
        sample_paths = paths_by_sample.setdefault(file.sample_id, {})
        column = column_of[file.folder, file.kind]
        if column in sample_paths:
            raise DatasetError(
                f"{root}: {sample_paths[column]} and {file.path} are two files of kind {file.kind} for one sample: "
                f"rename one, {_METADATA_HINT}"
            )
        sample_paths[column] = file.path
    samples = {file.sample_id: file for file in files}
    if without_class := [file.path for file in samples.values() if "/" not in file.class_path]:
        raise DatasetError(
            f"{root}: {without_class[0]} is not in a folder named after its class: sort the files into folders, "
            f"{_METADATA_HINT}"
        )
    names = sorted(samples)
    columns = {"id": names, "label": [samples[name].class_path.split("/")[0] for name in names]}
    splits = [split_of_name(samples[name].split or "") for name in names]
    if any(splits) and any(divide(splits, source=f"{root}, by the names of the folders")):
        columns[SPLIT] = [str(split) for split in splits]
    path_columns = sorted(set(column_of.values()))
    paths = {column: [paths_by_sample[name].get(column) for name in names] for column in path_columns}
    return pa.table({name: pa.array(values, pa.string()) for name, values in {**columns, **paths}.items()})


def _column_names(files: Sequence[LayoutFile]) -> dict[tuple[str | None, str], str]:
    """Return the column name of each (folder, kind): the kind, or the folder if several have the same kind."""
    modalities = sorted({(file.folder, file.kind) for file in files}, key=str)
    kinds = [kind for _, kind in modalities]
    return {
        (folder, kind): _column_name(kind if folder is None or kinds.count(kind) == 1 else folder, kind)
        for folder, kind in modalities
    }


def _column_name(name: str, kind: str) -> str:
    if kind == _FRAMES:
        return f"{'visual' if name == _FRAMES else name}_frames"
    return f"{name}_file_name"
