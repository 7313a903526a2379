"""Export of manifests: what an exporter is, and those of text: csv, jsonl, sample ids, OGM-GE lists."""

from __future__ import annotations

import csv
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ..audit.dataset.columns import SPLIT_NAMES
from ..audit.dataset.dataset import Dataset
from ..audit.errors import ConfigError, ManifestError, RunError
from ..audit.remote.paths import AnyPath
from ..audit.storage import atomic_folder, atomic_write
from . import EXPORTERS
from .manifest import (
    COLUMNS,
    check_types,
    is_number,
    is_text,
    manifest_schema,
    read_batches_of_manifest,
    read_num_rows,
    read_provenance,
)
from .score_files import NO_SPLIT

_OGM_FILES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}  # the names that its readers expect
# Start of a text that a spreadsheet evaluates as a formula, including apostrophes of an escaped one.
_FORMULA, _ESCAPED = "^('*[=+\\-@\\t\\r\\n＝＋－＠])", "'\\1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """Settings of one export.

    Attributes:
        manifest: The manifest file; see `plain_rows` for its rows.
        schema: Its columns, without metadata.
        paths: Names of the columns of the source's own paths.
        provenance: What the manifest was made from.
        root: Folder of the media, which may be at a URL; None if unknown.
        allow_outside: Whether paths may lead outside the root.
        skip_missing: Skip and count missing media instead of raising.
        escape_formulas: Escape texts that a spreadsheet would run; of csv only.
    """

    manifest: Path
    schema: pa.Schema
    paths: tuple[str, ...]
    provenance: dict[str, Any]
    root: AnyPath | None
    allow_outside: bool
    skip_missing: bool
    escape_formulas: bool


class Exporter(ABC):
    """A format of exports: one class, listed in EXPORTERS. A manifest that it cannot hold raises ConfigError.

    Attributes:
        files: Names of the files and folders in the folder that it writes, and may replace; None if it writes one file.
        marks: Files of which at least one is in such a folder.
        contains_media: Whether it reads the media of the source.

    Example:
        >>> class Ids(Exporter):
        ...     def write(self, job, out):
        ...         out.write_text("".join(f"{row['sample_id']}\\n" for row in plain_rows(job, "sample_id")))
        ...         return {}
    """

    files: ClassVar[re.Pattern[str] | None] = None
    marks: ClassVar[tuple[str, ...]] = ()
    contains_media: ClassVar[bool] = False

    @abstractmethod
    def write(self, job: ExportJob, out: Path) -> dict[str, Any]:
        """Write the file, or into the empty folder, `out`, the same bytes for the same rows; return its counts."""


def plain_rows(job: ExportJob, *columns: str) -> Iterator[dict[str, Any]]:
    """Yield the rows as Python values; float32 by its shortest decimal form, non-finite numbers as None."""
    names = list(dict.fromkeys(columns or job.schema.names))
    for table in read_batches_of_manifest(job.manifest, columns=names):
        yield from pa.table({name: _shortest_digits(table[name]) for name in names}).to_pylist()


def _shortest_digits(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return finite if column.type == pa.float64() else finite.cast(pa.string()).cast(pa.float64())


def split_name(split: str | None) -> str:
    """Return the name of a split in file names."""
    if split is None:
        return NO_SPLIT
    if not re.fullmatch(r"\w+", split):
        raise ConfigError(f"split {split!r} is not usable in file names: use letters, digits and _, or export as csv")
    return split


def contains_media(manifest: Path, format: str) -> bool:
    """Return whether an export in this format contains the media of the manifest, so that they must be readable."""
    exporter: Exporter = EXPORTERS.load(format)()
    return exporter.contains_media and any(name not in COLUMNS for name in manifest_schema(manifest).names)


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
    skip_missing: bool = False,
    escape_formulas: bool = True,
) -> dict[str, Any]:
    """Write a manifest in another format, atomically. The same manifest gives the same bytes.

    Args:
        manifest: path of the manifest.
        out: file or folder to write.
        format: a name in EXPORTERS, or that of an exporter of an installed package.
        dataset: source of the media, which are read from its folder only.
        root: folder of the media if there is no dataset; folders named in the manifest are never used.
        overwrite: replace `out` if it is an export of the same format.
        skip_missing: skip and count missing media instead of raising.
        escape_formulas: escape csv texts, see escape_formula.

    Returns:
        format, files, rows, and counts of the format.

    Raises:
        ConfigError: the format is unknown or cannot hold the manifest.
        ManifestError: the file is not a manifest, or media cannot be read.
        RunError: `out` exists and may not be overwritten.
    """
    exporter: Exporter = EXPORTERS.load(format)()
    manifest, out = Path(manifest), Path(out)
    provenance = read_provenance(manifest)
    first = next(read_batches_of_manifest(manifest), None)
    if first is None:
        raise ManifestError(f"{manifest} holds no rows: recreate it with mmaudit split")
    check_types(first.schema, where=str(manifest))
    _check_column_types(first.schema, manifest)
    if out.exists() and not overwrite:
        raise RunError(f"{out} exists: choose another path with --out, or pass --overwrite")
    if out.exists():
        _check_replaceable(out, manifest, exporter, format=format)
    job = ExportJob(
        manifest=manifest,
        schema=first.schema.remove_metadata(),
        paths=tuple(name for name in first.schema.names if name not in COLUMNS),
        provenance=provenance,
        root=root if dataset is None else dataset.root,
        allow_outside=dataset is not None and dataset.allow_outside,
        skip_missing=skip_missing,
        escape_formulas=escape_formulas,
    )
    with (atomic_write if exporter.files is None else atomic_folder)(out) as temporary:
        extra = exporter.write(job, temporary)
    files = sorted(str(path) for path in out.rglob("*") if path.is_file()) if out.is_dir() else [str(out)]
    return {"format": format, "files": files, "rows": read_num_rows(manifest), **extra}


def _check_column_types(schema: pa.Schema, manifest: Path) -> None:
    """Raise ManifestError for a column that a text file cannot hold."""
    for field in schema:
        type_ = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if not (is_text(type_) or is_number(type_) or pa.types.is_boolean(type_) or pa.types.is_null(type_)):
            raise ManifestError(f"{manifest}: column {field.name} is {type_}; only texts and numbers can be exported")


def _check_replaceable(out: Path, manifest: Path, exporter: Exporter, *, format: str) -> None:
    """Raise if `out` is not an export of this format, or is the manifest itself."""
    if out.resolve() == manifest.resolve():
        raise ConfigError(f"{out} is the manifest itself: choose another path with --out")
    if out.is_dir() == (exporter.files is None):
        kind = "folder" if out.is_dir() else "file"
        raise RunError(f"{out} is a {kind}, not an export as {format}: choose another path with --out")
    if out.suffix.lower() in (".parquet", ".arrow", ".html", ".toml"):
        raise RunError(f"{out} is not a {format} file: choose another path with --out")
    if exporter.files is None:
        return
    names = [path.name for path in out.iterdir()]
    foreign = [name for name in names if not exporter.files.fullmatch(name)]
    is_marked = not exporter.marks or any((out / name).is_file() for name in exporter.marks)
    if foreign or (names and not is_marked):
        content = min(foreign, default="other files")
        raise RunError(f"{out} contains {content}, it is not an export as {format}: choose another path with --out")


class Csv(Exporter):
    """All columns as text; `escape_formulas` keeps spreadsheets from evaluating any."""

    def write(self, job: ExportJob, out: Path) -> dict[str, Any]:
        """Write a header and the rows; strings are quoted, a null is empty and unquoted."""
        tables: Iterator[pa.Table] = (table.cast(job.schema) for table in read_batches_of_manifest(job.manifest))
        head = job.schema.empty_table()
        if job.escape_formulas:
            head, tables = _escape_texts(head), map(_escape_texts, tables)
        with pa.csv.CSVWriter(out, head.schema) as writer:
            for table in tables:
                writer.write_table(table)
        return {}


def _escape_texts(table: pa.Table) -> pa.Table:
    """Escape formulas in text columns and in column names; numbers are unchanged."""
    columns = [
        pc.replace_substring_regex(column, _FORMULA, _ESCAPED) if is_text(column.type) else column
        for column in table.columns
    ]
    return pa.table(columns, names=[escape_formula(name) for name in table.column_names])


class JsonLines(Exporter):
    """All columns, with numbers as numbers."""

    def write(self, job: ExportJob, out: Path) -> dict[str, Any]:
        """Write one JSON object per line."""
        with out.open("w", encoding="utf-8", newline="\n") as file:
            for row in plain_rows(job):
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        return {}


class SampleIds(Exporter):
    """The sample ids, (n,) unicode, in the order of the manifest."""

    def write(self, job: ExportJob, out: Path) -> dict[str, Any]:
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
        with out.open("wb") as file:  # no memory map: on a full disk, writing to one raises SIGBUS
            np.lib.format.write_array_header_1_0(file, header)
            for table in read_batches_of_manifest(job.manifest, columns=["sample_id"]):
                file.write(np.array(table["sample_id"].to_pylist(), dtype=dtype).tobytes())
        return {}


class OgmLists(Exporter):
    """Lists of clips by split, as the OGM-GE code reads them.

    A clip is named after its file, since that code appends it to AudioWAV/ and Image-01-FPS/; without a file, by id.
    """

    files = re.compile(r"(train|val|test|stat)\.csv")

    def write(self, job: ExportJob, out: Path) -> dict[str, Any]:
        """Write train.csv, val.csv and test.csv of CLIP,LABEL without a header, and stat.csv of the classes."""
        classes: set[str] = set()
        written: set[str] = set()
        with ExitStack() as stack:
            files: dict[str, TextIO] = {}
            for row in plain_rows(job, "sample_id", "label", "label_name", "split", *job.paths):
                name = _OGM_FILES.get(SPLIT_NAMES.get(str(row["split"]).lower(), ""))
                if name is None:
                    raise ConfigError(
                        f"sample {row['sample_id']!r} is in split {row['split']!r}; OGM lists exist for train, "
                        "validation and test only: export as csv, or score data with these splits"
                    )
                if name not in files:
                    files[name] = stack.enter_context((out / name).open("w", encoding="utf-8", newline=""))
                clip = _clip_name(row, job.paths)
                label = str(row["label"] if row["label_name"] is None else row["label_name"])
                _check_ogm_row(row["sample_id"], clip, label, is_repeated=f"{clip}\0{label}" in written)
                written.add(f"{clip}\0{label}")
                classes.add(label)
                csv.writer(files[name], lineterminator="\n").writerow([clip, label])
        with (out / "stat.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([name] for name in sorted(classes))
        return {}


def _clip_name(row: dict[str, Any], path_columns: tuple[str, ...]) -> str:
    path = next((row[name] for name in path_columns if row[name] is not None), None)
    return str(row["sample_id"]) if path is None else PurePosixPath(str(path)).stem


def _check_ogm_row(sample_id: str, clip: str, label: str, *, is_repeated: bool) -> None:
    for part_name, text in (("clip", clip), ("class", label)):
        if text != text.strip() or len(text.splitlines()) != 1 or "\0" in text:
            raise ConfigError(f"sample {sample_id!r}: an OGM list cannot hold the {part_name} {text!r}; export as csv")
    if "/" in clip:
        raise ConfigError(f"sample {sample_id!r}: the clip {clip!r} is not a file name; export as csv")
    if is_repeated:
        raise ConfigError(
            f"sample {sample_id!r}: another sample has the same clip {clip!r} and class {label!r}; export as csv"
        )
