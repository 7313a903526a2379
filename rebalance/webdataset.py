"""Export as WebDataset tar files, and the rows that an export writes."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from ..audit.dataset.cells import load_cell
from ..audit.dataset.modalities import Modality
from ..audit.errors import ConfigError, ManifestError
from ..audit.hashing import digest
from ..audit.media.files import Medium, stream_of
from ..audit.quarantine import UnusableError
from .manifest import batches_of
from .score_files import NO_SPLIT


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What is to be written. `root` is None where the source of the media cannot be told."""

    manifest: Path
    schema: pa.Schema  # without metadata
    paths: tuple[str, ...]
    provenance: dict[str, Any]
    root: Path | None
    allow_outside: bool
    samples_per_shard: int
    skip_missing: bool
    clip: str | None
    escape_formulas: bool = True


def plain_rows(job: ExportJob, *columns: str) -> Iterator[dict[str, Any]]:
    """Yield the rows as plain values; a float32 by its shortest digits, what is no finite number as None."""
    names = list(dict.fromkeys(columns or job.schema.names))
    for table in batches_of(job.manifest, columns=names):
        yield from pa.table({name: _shortest_digits(table[name]) for name in names}).to_pylist()


def _shortest_digits(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return finite if column.type == pa.float64() else finite.cast(pa.string()).cast(pa.float64())


def split_name(split: str | None) -> str:
    """Give what a split's files are called."""
    if split is None:
        return NO_SPLIT
    if not re.fullmatch(r"\w+", split):
        raise ConfigError(f"split {split!r} can name no file: a split is letters, digits and _; rename it, or use csv")
    return split


SAMPLES_PER_SHARD = 1_000  # of a tar
_MAX_KEY_LENGTH = 180  # of the 255 bytes that a name may have, with room for modality and extension
_FILE_SUFFIXES = ("_file_name", "_filename", "_filepath", "_file", "_path", "_frames")
_GENERIC_COLUMNS = ("file_name", "path", "file", "filename", "filepath")


def write_webdataset(job: ExportJob, folder: Path) -> dict[str, Any]:
    """Write SPLIT-000000.tar, ...: of each sample KEY.json, and KEY.NAME.EXT for each path column.

    The .json has the row without nulls, and under `files` the paths that the media had, which no longer hold.
    """
    if not job.paths:
        raise ConfigError(
            f"{job.manifest} names no files: its media are vectors, texts or bytes within the source, and a WebDataset "
            "would hold rows alone; export as jsonl or datasets"
        )
    if job.root is None:
        raise ManifestError(f"{job.manifest}: the folder of its media is not named; pass --data")
    modalities = {name: _modality_of(name, job) for name in job.paths}
    read = {each.get("column") for each in job.provenance.get("scores", {}).get("modalities", [])}
    skipped = 0
    with ExitStack() as stack:
        tars: dict[str, _TarWriter] = {}
        for row in plain_rows(job):
            split = split_name(row["split"])
            if split not in tars:
                tars[split] = _TarWriter(folder, split, job.samples_per_shard)
                stack.callback(tars[split].close)
            members, lost = _sample_members(row, modalities, job)
            skipped += lost
            tars[split].add(webdataset_key(row["sample_id"]), members)
    return {"skipped": skipped, "left_out": sorted(read - {*job.paths, None})}


def webdataset_key(sample_id: str) -> str:
    """Give the WebDataset key of an id: percent-encoded, dots too, so that no two ids share one.

    One that is longer than a file name may be is cut and ends in %% and a digest.
    """
    key = quote(sample_id, safe="").replace(".", "%2E") or "%"
    return key if len(key) <= _MAX_KEY_LENGTH else f"{key[: _MAX_KEY_LENGTH - 34]}%%{digest(sample_id.encode())}"


def _modality_of(column: str, job: ExportJob) -> Modality:
    """Name a column's member by the one modality read from it, else by the column; `kind` is only not of frames."""
    those = [each for each in job.provenance.get("scores", {}).get("modalities", []) if each.get("column") == column]
    if any(each.get("kind") == "frames" for each in those):
        raise ConfigError(
            f"{column} names folders of frames, and a sample of a WebDataset holds files: export as jsonl, or ogm"
        )
    stem = next((column.removesuffix(end) for end in _FILE_SUFFIXES if column.endswith(end)), column)
    if len(those) > 1 and column in _GENERIC_COLUMNS:
        stem = "video"  # both sound and sight are read from it, and called audio and visual again
    name = str(those[0]["name"]) if len(those) == 1 else stem or column
    return Modality(name=re.sub(r"[^a-z0-9_-]", "_", name.lower()), column=column, kind="audio")


def _sample_members(
    row: dict[str, Any], modalities: dict[str, Modality], job: ExportJob
) -> tuple[dict[str, Medium], int]:
    """Give the members of a sample by what follows the key's dot, and how many media were not there."""
    found: dict[str, Medium] = {}
    lost = 0
    for column, modality in modalities.items():
        if row[column] is None:
            continue
        extension = re.sub(r"[^a-z0-9]", "", PurePosixPath(row[column]).suffix.lower()) or "bin"
        name = f"{modality.name}.{extension}"
        if name in found or name in row:  # two columns of one name, or a field of the .json
            name = f"{modality.name}_{list(modalities).index(column)}.{extension}"
        try:
            assert job.root is not None
            found[name] = load_cell(row[column], modality, root=job.root, allow_outside=job.allow_outside)
        except UnusableError as error:
            if not job.skip_missing:
                raise ManifestError(
                    f"sample {row['sample_id']!r}: {column} {row[column]!r} cannot be read in {job.root} ({error}); "
                    "bring the file back, pass --data if the data moved, or --skip-missing"
                ) from error
            lost += 1
    about = {name: value for name, value in row.items() if value is not None and name not in modalities}
    files = {name: row[name] for name in modalities if row[name] is not None}
    text = json.dumps({**about, "files": files}, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return {"json": text.encode(), **found}, lost


class _TarWriter:
    """The tars of one split, each of as many samples; headers hold nothing of this machine or hour."""

    def __init__(self, folder: Path, split: str, most: int) -> None:
        self._folder, self._split, self._most = folder, split, most
        self._tar: tarfile.TarFile | None = None
        self._samples = 0

    def add(self, key: str, members: dict[str, Medium]) -> None:
        """Add a sample."""
        if self._samples % self._most == 0:
            self.close()
            path = self._folder / f"{self._split}-{self._samples // self._most:06d}.tar"
            self._tar = tarfile.TarFile(path, "w", format=tarfile.PAX_FORMAT)
        assert self._tar is not None
        for name in sorted(members):
            header = tarfile.TarInfo(f"{key}.{name}")  # mtime, uid and gid are 0, the owner's names empty
            header.size = len(members[name])
            with stream_of(members[name]) as file:
                self._tar.addfile(header, file)
        self._samples += 1

    def close(self) -> None:
        """End the last tar."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
