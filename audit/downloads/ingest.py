"""Ingestion: one table of clips from the official download of a dataset."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..dataset.formats.tables import METADATA_NAMES
from ..errors import ConfigError, DatasetError, choices
from ..parquet import write_parquet
from .ave import read_ave
from .clips import PATH_SUFFIXES, Cell, Listing, absence, absence_of_frames
from .cremad import read_cremad
from .image_text import read_image_text
from .mosei import read_mosei
from .ogm_ge import read_ogm_ge
from .ucf101 import read_ucf101
from .youtube import read_kinetics_sounds, read_vggsound

_EXAMPLES = 3  # ids named for each modality


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """How many clips lack one modality, and the first of them by id."""

    modality: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        """Write it for the end of a message."""
        return f"{self.modality} {self.count:,} (such as {', '.join(self.examples)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What was written: `listed` rows, of which `present` have all their media.

    `official` is the number of clips in the dataset where that is known and not all are listed, else `listed`.
    `unlisted` counts media that lie in the folder and that no row names.
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
        """Say in one line what is here and what is not; `notes` say the rest."""
        parts = [f"you have {self.present:,} of {self.official:,}"]
        if self.missing:
            parts.append("missing: " + ", ".join(map(str, self.missing)))
        if self.official > self.listed:
            parts.append(f"{self.official - self.listed:,} have no file at all, and no row")
        if self.unlisted:
            parts.append(f"{self.unlisted:,} media are in no list, and have no row")
        return "; ".join(parts)


def ingest(
    name: str, folder: str | Path, *, lists: Sequence[str | Path] = (), out: str | Path | None = None
) -> Ingested:
    """Write metadata.parquet for a download as it unpacks; clips whose media are missing have their rows all the same.

    `lists` names the lists to read instead of those that the folder holds; `out` is FOLDER/metadata.parquet, or a
    file above the folder. The same tree gives the same bytes. Raises ConfigError for an unknown adapter, DatasetError
    for a folder that is not that dataset, or a list that cannot be read.
    """
    if name not in ADAPTERS:
        raise ConfigError(f"no adapter {name!r}; {choices(name, ADAPTERS)}")
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"no such folder: {root}")
    path = _place(Path(out) if out is not None else root / "metadata.parquet", root)
    listing = ADAPTERS[name].read(root, tuple(_list_path(item) for item in lists))
    if not listing.rows.num_rows:
        raise DatasetError(f"{root}: the lists of {name} name no clip")
    rows = listing.rows.sort_by("id")
    there, reasons = _presence(rows, listing.media, root)
    ingested = Ingested(
        path=path,
        adapter=name,
        listed=rows.num_rows,
        present=sum(all(row) for row in zip(*there.values(), strict=True)),
        official=max(rows.num_rows, listing.official or 0),
        missing=tuple(_missing(rows, there)),
        unlisted=len(listing.found - set(_paths(rows, listing.media))),
        columns=tuple(rows.column_names),
        notes=(*listing.notes, *reasons, *_other_tables(path)),
    )
    _write(_from_folder(rows, listing.media, root=root, start=path.parent), ingested, listing)
    return ingested


def _write(rows: pa.Table, ingested: Ingested, listing: Listing) -> None:
    provenance = {
        "schema": "mmaudit.metadata/1",
        "adapter": ingested.adapter,
        # By name: the root imports cli for its types, and audit imports nothing that leads there.
        "version": importlib.import_module(__name__.partition(".")[0]).__version__,
        "listed": ingested.listed,
        "present": ingested.present,
        "notes": list(listing.notes),
    }
    write_parquet(rows, ingested.path, provenance=provenance)


def _place(out: Path, root: Path) -> Path:
    """Refuse a file from whose folder the media could not be named without a way out."""
    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: metadata are written as .parquet")
    if not root.resolve().is_relative_to(out.parent.resolve()):
        raise DatasetError(
            f"{out} would have to name media outside its own folder: write it into {root} or a folder above that"
        )
    return out


def _list_path(item: str | Path) -> Path:
    path = Path(item)
    if not path.is_file():
        raise DatasetError(f"no such list: {path}")
    return path


def _other_tables(path: Path) -> list[str]:
    others = [name for name in METADATA_NAMES if name != path.name and (path.parent / name).is_file()]
    clash = path.name in METADATA_NAMES and others
    return [f"{others[0]} lies beside it: name {path} itself where a dataset is asked for"] if clash else []


def _presence(rows: pa.Table, media: Sequence[str], root: Path) -> tuple[dict[str, list[bool]], list[str]]:
    """Tell for each modality and row whether the medium is there, and count the odd reasons why one is not."""
    odd: Counter[tuple[str, str]] = Counter()
    there = {}
    for column in media:
        if not column.endswith(PATH_SUFFIXES):
            there[column] = _cells_there(rows[column])
            continue
        judge = absence if column.endswith("_file_name") else absence_of_frames
        found = [_absence(cell, root, judge) for cell in rows[column].to_pylist()]
        there[_modality(column)] = [reason is None for reason in found]
        odd.update((_modality(column), reason) for reason in found if reason not in (None, "not there"))
    return there, [f"{modality}: {count:,} {reason}" for (modality, reason), count in sorted(odd.items())]


def _absence(cell: str | list[str] | None, root: Path, judge: Callable[[Path], str | None]) -> str | None:
    names = [cell] if isinstance(cell, str) else cell or []
    reasons = [reason for name in names if (reason := judge(root / name)) is not None]
    return next(iter(reasons), None) if names else "not there"


def _cells_there(column: pa.ChunkedArray) -> list[bool]:
    if pa.types.is_string(column.type):
        return [bool(text and text.strip()) for text in column.to_pylist()]
    return [bool(flag) for flag in column.is_valid().to_pylist()]


def _missing(rows: pa.Table, there: dict[str, list[bool]]) -> list[Missing]:
    ids = rows["id"].to_pylist()
    lacking = {name: [id_ for id_, flag in zip(ids, flags, strict=True) if not flag] for name, flags in there.items()}
    return [
        Missing(modality=name, count=len(names), examples=tuple(names[:_EXAMPLES]))
        for name, names in lacking.items()
        if names
    ]


def _modality(column: str) -> str:
    return next((column[: -len(suffix)] for suffix in PATH_SUFFIXES if column.endswith(suffix)), column)


def _paths(rows: pa.Table, media: Sequence[str]) -> list[str]:
    cells: list[Any] = [cell for name in media if name.endswith(PATH_SUFFIXES) for cell in rows[name].to_pylist()]
    return [path for cell in cells for path in ([cell] if isinstance(cell, str) else cell or [])]


def _from_folder(rows: pa.Table, media: Sequence[str], *, root: Path, start: Path) -> pa.Table:
    """Let the paths start from the folder that the table is written to."""
    way = os.path.relpath(root.resolve(), start.resolve())
    if way == ".":
        return rows
    prefix = Path(way).as_posix()
    for name in media:
        if name.endswith(PATH_SUFFIXES):
            cells = [_prefixed(cell, prefix) for cell in rows[name].to_pylist()]
            column = pa.array(cells, rows.schema.field(name).type)
            rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows


def _prefixed(cell: Any, prefix: str) -> Cell:
    if cell is None or isinstance(cell, str):
        return cell and f"{prefix}/{cell}"
    return tuple(f"{prefix}/{path}" for path in cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One download: what it looks like, for help texts, and the function of (folder, lists) that reads it."""

    expects: str
    read: Callable[[Path, Sequence[Path]], Listing]


ADAPTERS: dict[str, Adapter] = {
    "cremad": Adapter(expects="CREMA-D: AudioWAV/*.wav, VideoFlash/*.flv", read=read_cremad),
    "ave": Adapter(expects="AVE: AVE/*.mp4, trainSet.txt, valSet.txt, testSet.txt", read=read_ave),
    "kinetics-sounds": Adapter(
        expects="Kinetics-Sounds: lists with label,youtube_id,time_start,time_end,split and clips anywhere below",
        read=read_kinetics_sounds,
    ),
    "vggsound": Adapter(expects="VGGSound: vggsound.csv and clips anywhere below", read=read_vggsound),
    "ucf101": Adapter(
        expects="UCF-101 as frames: ucfTrainTestlist/, jpegs_256/, tvl1_flow/u/, tvl1_flow/v/", read=read_ucf101
    ),
    "mosei": Adapter(expects="CMU-MOSEI or CMU-MOSI features: one .pkl, or .npz files", read=read_mosei),
    "image-text": Adapter(
        expects="pictures with texts: csv, tsv or jsonl with columns for image, text and label", read=read_image_text
    ),
    "ogm-ge": Adapter(
        expects="the lists of the OGM-GE code: train.csv, test.csv, AudioWAV/ or audio/, Image-01-FPS/ or visual/",
        read=read_ogm_ge,
    ),
}
