"""Ingestion of the official download of a dataset into one table of clips."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..dataset.formats.tables import METADATA_NAMES
from ..errors import ConfigError, DatasetError
from ..storage import write_parquet
from . import DOWNLOADS
from .clips import PATH_SUFFIXES, Adapter, Cell, Listing, absence_of_file, absence_of_frames, cell_paths, content_of

_EXAMPLES = 3  # ids in the message for each modality


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Number of clips without one modality, and the first of their ids."""

    modality: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        """Return the text for a message."""
        return f"{self.modality} {self.count:,} (such as {', '.join(self.examples)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """Summary of the table that `ingest` wrote.

    Attributes:
        path: The table.
        adapter: Name of the dataset.
        listed: Rows of the table.
        present: Rows with all their media.
        official: Clips in the dataset if that is known and not all are listed, else `listed`.
        missing: Modalities without media in some rows, with their number and the first ids.
        unlisted: Media in the folder that are in no row.
        columns: Columns of the table.
        notes: Lines on what was left out or looks wrong.
    """

    path: Path
    adapter: str
    listed: int
    present: int
    official: int
    missing: tuple[Missing, ...]
    unlisted: int
    columns: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def message(self) -> str:
        """Return one line on present and missing clips; `notes` hold the rest."""
        parts = [f"you have {self.present:,} of {self.official:,}"]
        if self.missing:
            parts.append("missing: " + ", ".join(map(str, self.missing)))
        if self.official > self.listed:
            parts.append(f"{self.official - self.listed:,} have no files and no row")
        if self.unlisted:
            parts.append(f"{self.unlisted:,} media are in no list and have no row")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {**asdict(self), "path": str(self.path), "message": self.message}


def ingest(
    name: str, folder: str | Path, *, lists: Sequence[str | Path] = (), out: str | Path | None = None
) -> Ingested:
    """Write metadata.parquet for a download as unpacked; clips with missing media have rows, too.

    The same tree gives the same bytes.

    Args:
        name: Name of the dataset, one of DOWNLOADS or of an installed package.
        folder: Folder of the download.
        lists: Lists to read instead of those in the folder.
        out: File to write, in the folder or above it; FOLDER/metadata.parquet by default.

    Returns:
        Summary of the rows and of missing media.

    Raises:
        ConfigError: The dataset is unknown, or `out` is not a .parquet file.
        DatasetError: The folder is not that dataset, a list cannot be read, or no clip has its media.

    Example:
        >>> print(ingest("cremad", "CREMA-D").message)
        you have 7,442 of 7,442
    """
    read: Adapter = DOWNLOADS.load(name)
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"no such folder: {root}")
    path = _check_output(Path(out) if out is not None else root / "metadata.parquet", root)
    listing = read(root, tuple(_check_list(list_path) for list_path in lists))
    if not listing.rows.num_rows:
        raise DatasetError(f"{root}: the lists of {name} contain no clip")
    rows = listing.rows.sort_by("id")
    present_of_modality, absence_notes = _presence(rows, listing.media, root)
    ingested = Ingested(
        path=path,
        adapter=name,
        listed=rows.num_rows,
        present=sum(all(row) for row in zip(*present_of_modality.values(), strict=True)),
        official=max(rows.num_rows, listing.official or 0),
        missing=tuple(_missing(rows, present_of_modality)),
        unlisted=len(listing.media_files - set(_paths(rows, listing.media))),
        columns=tuple(rows.column_names),
        notes=(*listing.notes, *absence_notes, *_other_tables(path)),
    )
    if not ingested.present:
        raise DatasetError(_absence_message(ingested, listing, root, absence_notes))
    _write(_rebase_paths(rows, listing.media, root=root, start=path.parent), ingested, listing)
    return ingested


def _absence_message(ingested: Ingested, listing: Listing, root: Path, absence_notes: Sequence[str]) -> str:
    """Return the error for a download of which no clip has its media: what was expected, and what lies there."""
    parts = [f"{root}: 0 of {ingested.listed:,} listed clips have their media"]
    parts += [*absence_notes] or [f"missing: {', '.join(map(str, ingested.missing))}"]
    unlisted = sorted(listing.media_files - set(_paths(listing.rows, listing.media)))
    if listing.spelling and ingested.missing and not absence_notes:
        parts.append(f"expected: {listing.spelling}")
    examples = f"{len(unlisted):,} media such as {', '.join(unlisted[:_EXAMPLES])}" if unlisted else content_of(root)
    return "; ".join([*parts, f"the folder contains {examples}"])


def _write(rows: pa.Table, ingested: Ingested, listing: Listing) -> None:
    provenance = {
        "schema": "mmaudit.metadata/1",
        "adapter": ingested.adapter,
        # Imported by name: the root package imports cli for its types, and audit must not import cli.
        "version": importlib.import_module(__name__.partition(".")[0]).__version__,
        "listed": ingested.listed,
        "present": ingested.present,
        "notes": list(listing.notes),
    }
    write_parquet(rows, ingested.path, provenance=provenance)


def _check_output(out: Path, root: Path) -> Path:
    """Return `out`; raise an error unless it is a .parquet file in `root` or a folder above it."""
    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: the file must be .parquet")
    if not root.resolve().is_relative_to(out.parent.resolve()):
        raise DatasetError(
            f"{out} would refer to media outside its own folder: write it into {root} or a folder above that"
        )
    return out


def _check_list(list_path: str | Path) -> Path:
    path = Path(list_path)
    if not path.is_file():
        raise DatasetError(f"no such list: {path}")
    return path


def _other_tables(path: Path) -> list[str]:
    other_names = [name for name in METADATA_NAMES if name != path.name and (path.parent / name).is_file()]
    if path.name not in METADATA_NAMES or not other_names:
        return []
    return [f"{path.parent} also contains {other_names[0]}: pass {path}, not the folder, as the dataset"]


def _presence(rows: pa.Table, media: Sequence[str], root: Path) -> tuple[dict[str, list[bool]], list[str]]:
    """Return for each modality whether the medium of each row exists, and notes on media that cannot be read."""
    unusual_reasons: Counter[tuple[str, str]] = Counter()
    present_of_modality = {}
    for column in media:
        if not column.endswith(PATH_SUFFIXES):
            present_of_modality[column] = _is_cell_present(rows[column])
            continue
        find_absence = absence_of_file if column.endswith("_file_name") else absence_of_frames
        cell_absences = [_absence(cell, root, find_absence) for cell in rows[column].to_pylist()]
        present_of_modality[_modality(column)] = [reason is None for reason in cell_absences]
        unusual_reasons.update(
            (_modality(column), reason) for reason in cell_absences if reason not in (None, "not found")
        )
    notes = [f"{modality}: {count:,} {reason}" for (modality, reason), count in sorted(unusual_reasons.items())]
    return present_of_modality, notes


def _absence(cell: str | list[str] | None, root: Path, find_absence: Callable[[Path], str | None]) -> str | None:
    names = cell_paths(cell)
    reasons = [reason for name in names if (reason := find_absence(root / name)) is not None]
    return next(iter(reasons), None) if names else "not found"


def _is_cell_present(column: pa.ChunkedArray) -> list[bool]:
    if pa.types.is_string(column.type):
        return [bool(text and text.strip()) for text in column.to_pylist()]
    return [bool(flag) for flag in column.is_valid().to_pylist()]


def _missing(rows: pa.Table, present_of_modality: dict[str, list[bool]]) -> list[Missing]:
    ids = rows["id"].to_pylist()
    missing = []
    for modality, present in present_of_modality.items():
        if missing_ids := [id_ for id_, flag in zip(ids, present, strict=True) if not flag]:
            missing.append(Missing(modality=modality, count=len(missing_ids), examples=tuple(missing_ids[:_EXAMPLES])))
    return missing


def _modality(column: str) -> str:
    return next((column[: -len(suffix)] for suffix in PATH_SUFFIXES if column.endswith(suffix)), column)


def _paths(rows: pa.Table, media: Sequence[str]) -> list[str]:
    cells: list[Any] = [cell for name in media if name.endswith(PATH_SUFFIXES) for cell in rows[name].to_pylist()]
    return [path for cell in cells for path in cell_paths(cell)]


def _rebase_paths(rows: pa.Table, media: Sequence[str], *, root: Path, start: Path) -> pa.Table:
    """Make the paths relative to the folder that the table is written to."""
    relative_root = os.path.relpath(root.resolve(), start.resolve())
    if relative_root == ".":
        return rows
    prefix = Path(relative_root).as_posix()
    for name in media:
        if name.endswith(PATH_SUFFIXES):
            cells = [_add_prefix(cell, prefix) for cell in rows[name].to_pylist()]
            column = pa.array(cells, rows.schema.field(name).type)
            rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows


def _add_prefix(cell: Any, prefix: str) -> Cell:
    if cell is None or isinstance(cell, str):
        return cell and f"{prefix}/{cell}"
    return tuple(f"{prefix}/{path}" for path in cell)
