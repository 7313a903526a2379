"""Export of manifests: csv, jsonl, ids, OGM-GE lists, WebDataset tars, saved datasets."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ..audit.dataset.columns import SPLIT_NAMES
from ..audit.dataset.dataset import Dataset
from ..audit.errors import ConfigError, ManifestError, RunError, choices
from ..audit.hashing import digest
from ..audit.storage import atomic_folder, atomic_write, scratch_folder
from .manifest import (
    COLUMNS,
    check_types,
    is_number,
    is_text,
    manifest_schema,
    read_batches_of_manifest,
    read_num_rows,
    read_provenance,
    read_stated_digests,
)
from .webdataset import SAMPLES_PER_SHARD, ExportJob, plain_rows, split_name, write_webdataset

_OGM_FILES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}  # the names that its readers expect
_EXPORT_FILES = {  # files that an export to a folder writes, and may overwrite
    "ogm": re.compile(r"(train|val|test|stat)\.csv"),
    "webdataset": re.compile(r"\w+-\d{6}\.tar"),
    "datasets": re.compile(r"dataset_dict\.json|state\.json|dataset_info\.json|data-\d{5}-of-\d{5}\.arrow|\w+"),
}
# Start of a text that a spreadsheet evaluates as a formula, including apostrophes of an escaped one.
_FORMULA, _ESCAPED = "^('*[=+\\-@\\t\\r\\n＝＋－＠])", "'\\1"


def escape_formula(text: str) -> str:
    """Return text with an apostrophe prepended if a spreadsheet would run it: it begins with = + - @, tab or newline.

    The inverse removes one apostrophe from each text that begins with apostrophes followed by such a character.
    """
    return re.sub(_FORMULA, r"'\1", text)


def export_manifest(
    manifest: Path,
    out: Path,
    *,
    format: str,
    dataset: Dataset | None = None,
    root: Path | None = None,
    overwrite: bool = False,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    skip_missing: bool = False,
    clip: str | None = None,
    escape_formulas: bool = True,
) -> dict[str, Any]:
    """Write a manifest in another format, atomically. The same manifest gives the same bytes.

    Args:
        manifest: path of the manifest.
        out: file or folder to write.
        format: one of FORMATS. csv and jsonl have all columns; npy the sample ids, (n,) unicode, in the order of the
            manifest; ogm a folder of CLIP,LABEL lists by split; webdataset a folder of tars by split with the media;
            datasets a folder as of save_to_disk.
        dataset: source of the media, which are read from its folder only.
        root: folder of the media if there is no dataset; folders named in the manifest are never used.
        overwrite: replace `out` if it is an export of the same format.
        samples_per_shard: samples per tar of a webdataset, at least 1.
        skip_missing: skip and count missing media instead of raising.
        clip: column by whose file name, without extension, an OGM list names clips; None is the first path column.
        escape_formulas: escape csv texts, see escape_formula.

    Returns:
        format, files, rows, and counts of the format.

    Raises:
        ConfigError: the format is unknown or cannot hold the manifest.
        ManifestError: the file is not a manifest, or media cannot be read.
        RunError: `out` exists and may not be overwritten.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: unknown format; {choices(format, FORMATS)}")
    if samples_per_shard < 1:
        raise ConfigError(f"samples per shard is {samples_per_shard}; it must be at least 1")
    manifest, out = Path(manifest), Path(out)
    provenance = read_provenance(manifest)
    first = next(read_batches_of_manifest(manifest), None)
    if first is None:
        raise ManifestError(f"{manifest} holds no rows: recreate it with mmaudit split")
    check_types(first.schema, where=str(manifest))
    _check_column_types(first.schema, manifest)
    _check_overwrite(out, manifest, format=format, overwrite=overwrite)
    job = ExportJob(
        manifest=manifest,
        schema=first.schema.remove_metadata(),
        paths=tuple(name for name in first.schema.names if name not in COLUMNS),
        provenance=provenance,
        root=root if dataset is None else dataset.root,
        allow_outside=dataset is not None and dataset.allow_outside,
        samples_per_shard=samples_per_shard,
        skip_missing=skip_missing,
        clip=clip,
        escape_formulas=escape_formulas,
    )
    with (atomic_folder if format in _EXPORT_FILES else atomic_write)(out) as temporary:
        extra = _WRITERS[format](job, temporary)
    files = sorted(str(path) for path in out.rglob("*") if path.is_file()) if out.is_dir() else [str(out)]
    return {"format": format, "files": files, "rows": read_num_rows(manifest), **extra}


def contains_media(manifest: Path, format: str) -> bool:
    """Return whether an export in this format contains the media of the manifest, so that they must be readable."""
    return format == "webdataset" and any(name not in COLUMNS for name in manifest_schema(manifest).names)


def _check_column_types(schema: pa.Schema, manifest: Path) -> None:
    """Raise ManifestError for a column that a text file cannot hold."""
    for field in schema:
        type_ = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if not (is_text(type_) or is_number(type_) or pa.types.is_boolean(type_) or pa.types.is_null(type_)):
            raise ManifestError(f"{manifest}: column {field.name} is {type_}; only texts and numbers can be exported")


def _check_overwrite(out: Path, manifest: Path, *, format: str, overwrite: bool) -> None:
    """Raise if `out` exists, unless `overwrite` is set and it is an export of this format."""
    if not out.exists():
        return
    if not overwrite:
        raise RunError(f"{out} exists: choose another path with --out, or pass --overwrite")
    if out.resolve() == manifest.resolve():
        raise ConfigError(f"{out} is the manifest itself: choose another path with --out")
    if out.is_dir() != (format in _EXPORT_FILES):
        kind = "folder" if out.is_dir() else "file"
        raise RunError(f"{out} is a {kind}, not an export as {format}: choose another path with --out")
    if out.suffix.lower() in (".parquet", ".arrow", ".html", ".toml"):
        raise RunError(f"{out} is not a {format} file: choose another path with --out")
    foreign = (
        [path.name for path in out.iterdir() if not _EXPORT_FILES[format].fullmatch(path.name)] if out.is_dir() else []
    )
    is_dataset = format != "datasets" or any((out / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if foreign or (not is_dataset and any(out.iterdir())):
        content = min(foreign, default="other files")
        raise RunError(f"{out} contains {content}, it is not an export as {format}: choose another path with --out")


def _write_csv(job: ExportJob, path: Path) -> dict[str, Any]:
    """Write a header and the rows; strings are quoted, a null is empty and unquoted."""
    escape = _escape_texts if job.escape_formulas else _unchanged
    head = escape(job.schema.empty_table())
    with pa.csv.CSVWriter(path, head.schema) as writer:
        for table in read_batches_of_manifest(job.manifest):
            writer.write_table(escape(table.cast(job.schema)))
    return {}


def _unchanged(table: pa.Table) -> pa.Table:
    return table


def _escape_texts(table: pa.Table) -> pa.Table:
    """Escape formulas in text columns and in column names; numbers are unchanged."""
    columns = [
        pc.replace_substring_regex(column, _FORMULA, _ESCAPED) if is_text(column.type) else column
        for column in table.columns
    ]
    return pa.table(columns, names=[escape_formula(name) for name in table.column_names])


def _write_jsonl(job: ExportJob, path: Path) -> dict[str, Any]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in plain_rows(job):
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return {}


def _write_npy(job: ExportJob, path: Path) -> dict[str, Any]:
    """Write the ids as fixed-width unicode, which needs no pickle; a first pass computes the width."""
    width = count = 0
    for table in read_batches_of_manifest(job.manifest, columns=["sample_id"]):
        ids = table["sample_id"]
        width = max(width, pc.max(pc.utf8_length(ids)).as_py() or 0)
        count += len(ids)
        if (ends_in_nul := pc.filter(ids, pc.ends_with(ids, pattern="\0"))).length():
            raise ConfigError(f"sample {ends_in_nul[0].as_py()!r} ends in NUL, which numpy strips: export as jsonl")
    dtype = np.dtype(f"<U{max(1, width)}")
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    with path.open("wb") as file:  # no memory map: on a full disk, writing to one raises SIGBUS
        np.lib.format.write_array_header_1_0(file, header)
        for table in read_batches_of_manifest(job.manifest, columns=["sample_id"]):
            file.write(np.array(table["sample_id"].to_pylist(), dtype=dtype).tobytes())
    return {}


def _write_ogm(job: ExportJob, folder: Path) -> dict[str, Any]:
    """Write train.csv, val.csv and test.csv of CLIP,LABEL without a header, and stat.csv, which lists the classes.

    A clip is named after its file, since the OGM code appends it to AudioWAV/ and Image-01-FPS/; without a file, by id.
    """
    if job.clip is not None and job.clip not in job.schema.names:
        raise ConfigError(f"clip column {job.clip!r} not found; {choices(job.clip, ('sample_id', *job.paths))}")
    name_columns = job.paths if job.clip is None else (job.clip,)
    classes: set[str] = set()
    written: set[str] = set()
    with ExitStack() as stack:
        files: dict[str, TextIO] = {}
        for row in plain_rows(job, "sample_id", "label", "label_name", "split", *name_columns):
            name = _OGM_FILES.get(SPLIT_NAMES.get(str(row["split"]).lower(), ""))
            if name is None:
                raise ConfigError(
                    f"sample {row['sample_id']!r} is in split {row['split']!r}; OGM lists exist for train, validation "
                    "and test only: export as csv, or score data with these splits"
                )
            if name not in files:
                files[name] = stack.enter_context((folder / name).open("w", encoding="utf-8", newline=""))
            clip = _clip_name(row, name_columns)
            label = str(row["label"] if row["label_name"] is None else row["label_name"])
            _check_ogm_row(row["sample_id"], clip, label, is_repeated=f"{clip}\0{label}" in written)
            written.add(f"{clip}\0{label}")
            classes.add(label)
            csv.writer(files[name], lineterminator="\n").writerow([clip, label])
    with (folder / "stat.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([name] for name in sorted(classes))
    return {}


def _clip_name(row: dict[str, Any], name_columns: tuple[str, ...]) -> str:
    path = next((row[name] for name in name_columns if name != "sample_id" and row[name] is not None), None)
    return str(row["sample_id"]) if path is None else PurePosixPath(str(path)).stem


def _check_ogm_row(sample_id: str, clip: str, label: str, *, is_repeated: bool) -> None:
    for part_name, text in (("clip", clip), ("class", label)):
        if text != text.strip() or len(text.splitlines()) != 1 or "\0" in text:
            raise ConfigError(f"sample {sample_id!r}: an OGM list cannot hold the {part_name} {text!r}; export as csv")
    if "/" in clip:
        raise ConfigError(f"sample {sample_id!r}: the clip {clip!r} is not a file name; choose a column of files")
    if is_repeated:
        raise ConfigError(
            f"sample {sample_id!r}: another sample has the same clip {clip!r} and class {label!r}; "
            "choose a column with unique file names, or sample_id"
        )


def _write_datasets(job: ExportJob, folder: Path) -> dict[str, Any]:
    """Write as Dataset.save_to_disk does, a DatasetDict for several splits, from Arrow files on disk."""
    import datasets

    manifest_digest = str(read_stated_digests(job.manifest).get("digest", "")) or digest(job.manifest.read_bytes())
    bars_enabled = not datasets.are_progress_bars_disabled()
    try:
        with scratch_folder(folder.parent) as scratch:
            paths_by_split = _arrow_by_split(job, scratch)
            sets = {
                split: datasets.Dataset(
                    datasets.table.MemoryMappedTable.from_file(str(path)),
                    info=datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(job.schema)),
                    fingerprint=digest(manifest_digest.encode(), split.encode())[
                        :16
                    ],  # the default of `datasets` differs by run
                )
                for split, path in paths_by_split.items()
            }
            datasets.disable_progress_bars()
            whole_set = datasets.DatasetDict(sets) if len(sets) > 1 else next(iter(sets.values()))
            whole_set.save_to_disk(str(folder))
    finally:
        if bars_enabled:
            datasets.enable_progress_bars()
    return {}


def _arrow_by_split(job: ExportJob, folder: Path) -> dict[str, Path]:
    """Write an Arrow stream of the rows of each split, in row order."""
    with ExitStack() as stack:
        writers: dict[str, Any] = {}
        for table in read_batches_of_manifest(job.manifest):
            for split in pc.unique(table["split"]).to_pylist():
                name = split_name(split)
                if name not in writers:
                    writers[name] = stack.enter_context(pa.ipc.new_stream(str(folder / f"{name}.arrow"), job.schema))
                mask = pc.is_null(table["split"]) if split is None else pc.equal(table["split"], split)
                writers[name].write_table(table.filter(mask).cast(job.schema))
    return {name: folder / f"{name}.arrow" for name in sorted(writers)}


_WRITERS: dict[str, Callable[[ExportJob, Path], dict[str, Any]]] = {
    "csv": _write_csv,
    "jsonl": _write_jsonl,
    "npy": _write_npy,
    "ogm": _write_ogm,
    "webdataset": write_webdataset,
    "datasets": _write_datasets,
}
FORMATS = tuple(_WRITERS)
