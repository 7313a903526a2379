"""Export as WebDataset tar files, with the media."""

from __future__ import annotations

import json
import re
import tarfile
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from ..audit.dataset.cells import load_cell
from ..audit.dataset.modalities import Modality
from ..audit.errors import ConfigError, ManifestError, UnusableError
from ..audit.hashing import digest
from ..audit.media.media_file import Medium, open_stream
from .export import Exporter, ExportJob, plain_rows, split_name

SAMPLES_PER_TAR = 1_000
_MAX_KEY_LENGTH = 180  # of the 255 bytes of a file name, leaving room for modality and extension
_FILE_SUFFIXES = ("_file_name", "_filename", "_filepath", "_file", "_path", "_frames")
_GENERIC_COLUMNS = ("file_name", "path", "file", "filename", "filepath")


class WebDataset(Exporter):
    """A folder of tars by split, SPLIT-000000.tar, ...: each sample with its row and its media."""

    files = re.compile(r"\w+-\d{6}\.tar")
    contains_media = True

    def write(self, job: ExportJob, out: Path) -> dict[str, Any]:
        """Write SPLIT-000000.tar, ...: for each sample KEY.json, and KEY.NAME.EXT for each path column.

        The .json has the row without nulls, and under `files` the original paths of the media.
        """
        if not job.paths:
            raise ConfigError(
                f"{job.manifest} has no path columns: its media are vectors, texts or bytes inside the source, and a "
                "WebDataset would contain rows only; export as jsonl or datasets"
            )
        if job.root is None:
            raise ManifestError(f"{job.manifest}: the folder of its media is unknown; pass --data")
        modalities = {name: _modality_of(name, job) for name in job.paths}
        scored_columns = {modality.get("column") for modality in job.provenance.get("scores", {}).get("modalities", [])}
        skipped = 0
        with ExitStack() as stack:
            tars: dict[str, _TarWriter] = {}
            for row in plain_rows(job):
                split = split_name(row["split"])
                if split not in tars:
                    tars[split] = _TarWriter(out, split)
                    stack.callback(tars[split].close)
                members, num_missing = _sample_members(row, modalities, job)
                skipped += num_missing
                tars[split].add(webdataset_key(row["sample_id"]), members)
        return {"skipped": skipped, "left_out": sorted(scored_columns - {*job.paths, None})}


def webdataset_key(sample_id: str) -> str:
    """Return the WebDataset key of an id: percent-encoded, dots too, so that keys are unique.

    A key that is too long for a file name is cut and ends in %% and a digest.
    """
    key = quote(sample_id, safe="").replace(".", "%2E") or "%"
    return key if len(key) <= _MAX_KEY_LENGTH else f"{key[: _MAX_KEY_LENGTH - 34]}%%{digest(sample_id.encode())}"


def _modality_of(column: str, job: ExportJob) -> Modality:
    """Return a modality named after the only one read from the column, else after the column; never of kind frames."""
    readers = [
        entry for entry in job.provenance.get("scores", {}).get("modalities", []) if entry.get("column") == column
    ]
    if any(entry.get("kind") == "frames" for entry in readers):
        raise ConfigError(
            f"{column} has folders of frames, but samples of a WebDataset are files: export as jsonl or ogm"
        )
    stem = next((column.removesuffix(end) for end in _FILE_SUFFIXES if column.endswith(end)), column)
    if len(readers) > 1 and column in _GENERIC_COLUMNS:
        stem = "video"  # audio and visual are read from the same file
    name = str(readers[0]["name"]) if len(readers) == 1 else stem or column
    return Modality(name=re.sub(r"[^a-z0-9_-]", "_", name.lower()), column=column, kind="audio")


def _sample_members(
    row: dict[str, Any], modalities: dict[str, Modality], job: ExportJob
) -> tuple[dict[str, Medium], int]:
    """Return the members of a sample by their name after the key's dot, and the number of missing media."""
    members: dict[str, Medium] = {}
    num_missing = 0
    for column, modality in modalities.items():
        if row[column] is None:
            continue
        extension = re.sub(r"[^a-z0-9]", "", PurePosixPath(row[column]).suffix.lower()) or "bin"
        name = f"{modality.name}.{extension}"
        if name in members or name in row:  # the name is taken by another column or a field of the .json
            name = f"{modality.name}_{list(modalities).index(column)}.{extension}"
        try:
            assert job.root is not None
            members[name] = load_cell(row[column], modality, root=job.root, allow_outside=job.allow_outside)
        except UnusableError as error:
            if not job.skip_missing:
                raise ManifestError(
                    f"sample {row['sample_id']!r}: {column} {row[column]!r} cannot be read in {job.root} ({error}); "
                    "restore the file, pass --data if the data moved, or --skip-missing"
                ) from error
            num_missing += 1
    fields = {name: value for name, value in row.items() if value is not None and name not in modalities}
    files = {name: row[name] for name in modalities if row[name] is not None}
    text = json.dumps({**fields, "files": files}, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return {"json": text.encode(), **members}, num_missing


class _TarWriter:
    """Writer of the tars of one split, of equal numbers of samples; headers do not depend on machine or time."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._tar: tarfile.TarFile | None = None
        self._samples = 0

    def add(self, key: str, members: dict[str, Medium]) -> None:
        """Write a sample, starting a new tar when the last one is full."""
        if self._samples % SAMPLES_PER_TAR == 0:
            self.close()
            path = self._folder / f"{self._split}-{self._samples // SAMPLES_PER_TAR:06d}.tar"
            self._tar = tarfile.TarFile(path, "w", format=tarfile.PAX_FORMAT)
        assert self._tar is not None
        for name in sorted(members):
            header = tarfile.TarInfo(f"{key}.{name}")  # mtime, uid and gid are 0, owner names empty
            header.size = len(members[name])
            with open_stream(members[name]) as file:
                self._tar.addfile(header, file)
        self._samples += 1

    def close(self) -> None:
        """Close the last tar."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
