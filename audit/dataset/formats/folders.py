"""Folders without a table: split, class, modality and sample from the names of files and folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from ...errors import DatasetError
from ..columns import SPLIT, split_of_folder, with_split
from ..modalities import holds_files, kind_of_path
from .tables import METADATA_NAMES, OTHER_FORMS, Plan, concat_rows, find_tables, plan_rows, read_rows

log = logging.getLogger("mmaudit")

# What the name of a folder holds that is about a modality rather than a class
_MODALITY_WORDS = ("audio", "sound", "wav", "speech", "image", "img", "picture", "photo", "video", "visual", "frame")
_MEND = "or write a metadata.csv with a column file_name (or NAME_file_name for each modality) and a column label"


@dataclass(frozen=True, slots=True, kw_only=True)
class Medium:
    """One file of a layout: its path below the root, its kind, and what the folders above it say."""

    path: str
    kind: str
    folder: str | None  # of its modality, where folders name these
    split: str | None
    rest: str  # the path without modality, split and extension

    @property
    def sample_id(self) -> str:
        """The path without modality and extension, which the files of one sample share."""
        return f"{self.split}/{self.rest}" if self.split else self.rest


def find_split_tables(folder: Path) -> list[Path]:
    """Find the metadata files that stand in the folders of a folder, such as train/metadata.csv, in order."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [path for path in inside if any((path / name).is_file() for name in METADATA_NAMES)]
    return [table for path in found for table in find_tables(str(path))[1]]


def plan_split_tables(root: Path, tables: Sequence[Path], *, shard_rows: int) -> Plan:
    """Plan the rows of one metadata file for each folder; folders that name splits become the column `split`.

    The paths in them become relative to `root`. A column that some lack is null there.
    """
    splits = [split_of_folder(table.parent.name) for table in tables]
    named = all(splits)
    parts = []
    for table in tables:
        rows = _below(read_rows(table), table.parent.name)
        parts.append(with_split(rows, table.parent.name if named and SPLIT not in rows.column_names else None))
    return plan_rows(root, concat_rows(parts, whence=str(root)), shard_rows=shard_rows)


def plan_layout(root: Path, *, shard_rows: int, allow_outside: bool) -> Plan | None:
    """Plan ROOT[/split]/class/file, one sample for the files of one name; None where there is no medium at all.

    Files of one path but for the extension are one sample: train/dog/1.wav and train/dog/1.png, and, where the first
    folders name modalities, audio/dog/1.wav and image/dog/1.png.
    """
    paths = list(_walk(root, allow_outside=allow_outside))
    media = [path for path in paths if kind_of_path(path) is not None]
    if not media:
        if paths:
            raise DatasetError(
                f"{root} holds {len(paths)} files, such as {paths[0]}, but no sound, picture or video: "
                f"name a folder or file of another kind, {_MEND}; {OTHER_FORMS}"
            )
        return None
    if len(media) < len(paths):
        other = next(path for path in paths if kind_of_path(path) is None)
        log.info("%s: %d files that are no media are left out, such as %s", root, len(paths) - len(media), other)
    rows = _rows(root, _place(media))
    log.info("%s: samples are files of one name, the label is their folder's", root)
    return plan_rows(root, rows, shard_rows=shard_rows)


def _walk(root: Path, *, allow_outside: bool) -> Iterator[str]:
    """Yield the paths of all files below the root, sorted, without hidden ones; links that lead outside are refused."""
    home = root.resolve()

    def inside(folder: Path, above: tuple[Path, ...]) -> Iterator[str]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if not Path(entry.path).is_dir():
                yield Path(entry.path).relative_to(root).as_posix()
                continue
            target = Path(entry.path).resolve()
            if not allow_outside and not target.is_relative_to(home):
                raise DatasetError(f"the folder {entry.path} leads outside {root}: move it here, or --allow-outside")
            if target in above:
                raise DatasetError(f"the folder {entry.path} leads to one above it: remove this link")
            yield from inside(Path(entry.path), (*above, target))

    yield from inside(root, (home,))


def _place(paths: Sequence[str]) -> list[Medium]:
    """Say of each file what the folders above it mean: a level counts as splits or modalities only as a whole."""
    parts = [PurePosixPath(path).with_suffix("").parts for path in paths]
    kinds = [str(kind_of_path(path)) for path in paths]
    folders: list[str | None] = [None] * len(paths)
    splits: list[str | None] = [None] * len(paths)
    for _ in range(2):  # audio/train/dog/1.wav and train/audio/dog/1.wav
        tops = [part[0] if len(part) > 1 else "" for part in parts]
        if not any(splits) and all(split_of_folder(top) for top in tops):
            splits = list(tops)
        elif not any(folders) and _are_modalities(tops, kinds):
            folders = list(tops)
        else:
            break
        parts = [part[1:] for part in parts]
    return [
        Medium(path=path, kind=kind, folder=folder, split=split, rest="/".join(part))
        for path, kind, folder, split, part in zip(paths, kinds, folders, splits, parts, strict=True)
    ]


def _are_modalities(tops: Sequence[str], kinds: Sequence[str]) -> bool:
    """Tell whether folders stand for modalities: each is named like one and holds one kind, and kinds differ."""
    pairs = set(zip(tops, kinds, strict=True))
    names = {top for top, _ in pairs}
    # Of one kind they are classes: cat_video beside dog_video.
    return len(set(kinds)) > 1 and len(pairs) == len(names) and all(map(_names_modality, names))


def _names_modality(folder: str) -> bool:
    return any(word in folder.lower() for word in _MODALITY_WORDS)


def _rows(root: Path, media: Sequence[Medium]) -> pa.Table:
    """Give one row for each sample: id, split, label, and a column of paths for each modality."""
    columns = _column_names(media)
    cells: dict[str, dict[str, str]] = {}
    for medium in media:
        cell = cells.setdefault(medium.sample_id, {})
        column = columns[medium.folder, medium.kind]
        if column in cell:
            raise DatasetError(
                f"{root}: {cell[column]} and {medium.path} are two files of kind {medium.kind} for one sample: "
                f"rename one, {_MEND}"
            )
        cell[column] = medium.path
    samples = {medium.sample_id: medium for medium in media}
    if flat := [medium.path for medium in samples.values() if "/" not in medium.rest]:
        raise DatasetError(
            f"{root}: {flat[0]} stands in no folder that could be its class: sort the files into folders, {_MEND}"
        )
    names = sorted(samples)
    found = {"id": names, "label": [samples[name].rest.split("/")[0] for name in names]}
    if any(medium.split for medium in media):
        found[SPLIT] = [str(samples[name].split) for name in names]
    paths = {column: [cells[name].get(column) for name in names] for column in sorted(set(columns.values()))}
    return pa.table({name: pa.array(values, pa.string()) for name, values in {**found, **paths}.items()})


def _column_names(media: Sequence[Medium]) -> dict[tuple[str | None, str], str]:
    """Name the column of each modality by its kind, or by its folder where two are of one kind."""
    modalities = sorted({(medium.folder, medium.kind) for medium in media}, key=str)
    kinds = [kind for _, kind in modalities]
    return {
        (folder, kind): f"{kind if folder is None or kinds.count(kind) == 1 else folder}_file_name"
        for folder, kind in modalities
    }


def _below(rows: pa.Table, folder: str) -> pa.Table:
    """Make the paths of a folder's table relative to the folder above it."""
    for index, field in enumerate(rows.schema):
        if holds_files(rows, field):
            moved = [_moved(cell, folder) for cell in rows[field.name].to_pylist()]
            rows = rows.set_column(index, field.name, pa.array(moved, field.type))
    return rows


def _moved(cell: object, folder: str) -> object:
    if isinstance(cell, list):
        return [_moved(each, folder) for each in cell]
    if not isinstance(cell, str) or cell.startswith("/") or "://" in cell:
        return cell
    return f"{folder}/{cell}"
