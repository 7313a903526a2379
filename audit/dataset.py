"""The only door to raw data: which samples are there, and where does each of their modalities stand?"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .encode import check_encoder
from .errors import ConfigError, DatasetError, choices
from .media import has_sound
from .modality import (
    Modality,
    check_modalities,
    choose_encoders,
    holds_bytes,
    infer_modalities,
    is_text,
    parse_modality,
)
from .quality import Reason, UnusableError
from .tables import Shard, find_tables, memory_shards, read_rows, row_group_shards

log = logging.getLogger("mmaudit")

_HEAD_ROWS = 64  # rows from which kinds are inferred
_SOUND_TRIALS = 8  # clips that are opened to see whether a video column has sound
_ROLE_NAMES = {
    "id": ("sample_id", "id", "uid", "key", "clip_id", "video_id"),
    "label": ("label", "class", "category", "target", "y", "label_name"),
    "label_name": ("label_name", "class_name"),
    "group": ("group",),
    "split": ("split",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which columns are what. None: found by name; `split = "none"` or `group = "none"`: leave that column alone."""

    modality: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()  # MODALITY=ENCODER for each that is not read by the default statistics
    task: str = "classification"  # what a label is: see target.py
    id: str | None = None
    label: str | None = None
    group: str | None = None
    split: str | None = None
    allow_outside: bool = False
    shard_rows: int = 256  # rows of a list of media that are encoded, and lost by Ctrl-C, at once
    test_fraction: float = 0.2  # of a dataset that comes without a split

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ConfigError(f"data.shard_rows is {self.shard_rows}; it must be at least 1")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"data.test_fraction is {self.test_fraction}; it must lie between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The column for each role; `label` is always there, the others may be None."""

    id: str | None
    label: str
    label_name: str | None
    group: str | None
    split: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A schema plus a plan of shards. Media stay on disk; `read` gives one shard's rows."""

    source: str
    root: Path
    modalities: tuple[Modality, ...]
    columns: Columns
    schema: pa.Schema
    shards: tuple[Shard, ...] = field(repr=False)
    allow_outside: bool = False

    @property
    def num_rows(self) -> int:
        """Samples in the source, usable or not."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def path_columns(self) -> list[str]:
        """The columns that name media files; they are passed through to every table."""
        columns = {m.column for m in self.modalities if m.kind != "text" and is_text(self.schema.field(m.column).type)}
        return [name for name in self.schema.names if name in columns]

    def read(self, shard: Shard, *, modalities: bool = True) -> pa.Table:
        """Read a shard's rows: the role columns, and those of the modalities unless `modalities` is False."""
        roles = [self.columns.id, self.columns.label, self.columns.label_name, self.columns.group, self.columns.split]
        wanted = {name for name in roles if name} | set(self.path_columns)
        if modalities:
            wanted |= {modality.column for modality in self.modalities}
        return shard.read([name for name in self.schema.names if name in wanted])

    def sample_ids(self, rows: pa.Table, shard: Shard) -> list[str]:
        """Give the ids of a shard's rows: the id column, else the first path column, else the row's number."""
        if self.columns.id:
            return [str(value) for value in rows[self.columns.id].to_pylist()]
        names = rows[self.path_columns[0]].to_pylist() if self.path_columns else [None] * rows.num_rows
        numbers = range(shard.first, shard.first + rows.num_rows)
        # A row whose path is null is quarantined, and must be told from the next one there.
        return [f"row-{number:09d}" if name is None else name for name, number in zip(names, numbers, strict=True)]

    def load(self, cell: Any, modality: Modality) -> Any:
        """Give what a cell stands for: the bytes of a medium, a text, or a vector; UnusableError when it is not there.

        Raises DatasetError for a path that leads outside the dataset's folder, unless that is allowed.
        """
        if cell is None:
            raise UnusableError(Reason.MISSING, f"{modality.column} is null")
        if modality.kind in ("features", "text"):
            return cell
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell["bytes"] is not None else cell.get("path")
        if isinstance(cell, bytes):
            return cell
        return self._read_file(str(cell))

    def _read_file(self, name: str) -> bytes:
        root = self.root.resolve()
        try:
            path = (root / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL in the name
            raise UnusableError(Reason.MISSING, f"no file {name!r}: {error}") from error
        if not self.allow_outside and ("://" in name or not path.is_relative_to(root)):
            raise DatasetError(
                f"{self.source}: {name!r} leads outside {self.root}; "
                "make paths relative to the metadata, or pass --allow-outside"
            )
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise UnusableError(Reason.MISSING, f"no file {name}") from error
        except OSError as error:
            raise UnusableError(Reason.CORRUPT, f"{name}: {error.strerror}") from error


def open_dataset(data: str | Path, config: DataConfig | None = None) -> Dataset:
    """Open a folder with a metadata file, a csv, jsonl or Parquet file, or a glob of Parquet files.

    Modalities are inferred from the columns and said aloud, unless `config.modality` names them.
    Raises DatasetError where the data are not a dataset, ConfigError where the config names what is not there.
    """
    config = config or DataConfig()
    root, paths = find_tables(str(data))
    head, shards = _plan(paths, config)
    if not shards or not head.num_rows:
        raise DatasetError(f"{data} holds no rows")
    columns = _find_columns(head, config)
    taken = [name for name in (columns.id, columns.label, columns.label_name, columns.group, columns.split) if name]
    named = [parse_modality(text, head) for text in config.modality]
    modalities = named or infer_modalities(head, taken=taken)
    _check_folders(paths, head, modalities)
    dataset = Dataset(
        source=str(data),
        root=root,
        modalities=tuple(modalities),
        columns=columns,
        schema=head.schema,
        shards=tuple(shards),
        allow_outside=config.allow_outside,
    )
    if not named:
        dataset = replace(dataset, modalities=tuple(_with_sound(dataset, head)))
    check_modalities(dataset.modalities, head.column_names)
    modalities = choose_encoders([_with_length(dataset, modality) for modality in dataset.modalities], config.encoder)
    for modality in modalities:
        check_encoder(modality)
    dataset = replace(dataset, modalities=tuple(modalities))
    log.info("modalities: %s", ", ".join(str(modality) for modality in dataset.modalities))
    return dataset


def _check_folders(paths: Sequence[Path], head: pa.Table, modalities: Sequence[Modality]) -> None:
    """Refuse files of several folders that name media: their paths could be relative to one of them only."""
    named = [m.column for m in modalities if m.kind != "text" and is_text(head.schema.field(m.column).type)]
    folders = sorted({str(path.parent) for path in paths})
    if named and len(folders) > 1:
        raise DatasetError(
            f"the files lie in {len(folders)} folders ({folders[0]}, {folders[1]}), and the paths in {named[0]!r} are "
            "relative to one: write one metadata file above them"
        )


def _plan(paths: list[Path], config: DataConfig) -> tuple[pa.Table, list[Shard]]:
    """Give the first rows and the shards. A Parquet file that holds more than names stays on disk."""
    if all(path.suffix == ".parquet" for path in paths):
        heads = [_parquet_head(path) for path in paths]
        for path, head in zip(paths, heads, strict=True):
            if not head.schema.equals(heads[0].schema):
                raise DatasetError(f"{path} has other columns than {paths[0]}")
        if any(not _is_light(type_) for type_ in heads[0].schema.types):
            return next((head for head in heads if head.num_rows), heads[0]), row_group_shards(paths)
    rows = pa.concat_tables([read_rows(path) for path in paths])
    return rows.slice(0, _HEAD_ROWS), memory_shards(rows, shard_rows=config.shard_rows)


def _parquet_head(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            batches: Iterator[pa.RecordBatch] = file.iter_batches(batch_size=_HEAD_ROWS)
            first = next(batches, None)
            return pa.Table.from_batches([first] if first is not None else [], schema=file.schema_arrow)
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _is_light(type_: pa.DataType) -> bool:
    return not (pa.types.is_nested(type_) or holds_bytes(type_))


def _find_columns(head: pa.Table, config: DataConfig) -> Columns:
    repeated = [name for name, count in Counter(head.column_names).items() if count > 1]
    if repeated:
        raise DatasetError(f"more than one column is called {repeated[0]!r}: rename all but one")
    found = {role: _find_column(head, role, getattr(config, role, None)) for role in _ROLE_NAMES}
    label = found["label"]
    if label is None:
        raise DatasetError(
            f"no label column among {', '.join(head.column_names)}: name it with --label COLUMN, or call it label"
        )
    if label == "label_name" or config.label not in (None, "label"):
        found["label_name"] = None  # names of some other label
    return Columns(
        id=found["id"], label=label, label_name=found["label_name"], group=found["group"], split=found["split"]
    )


def _find_column(head: pa.Table, role: str, named: str | None) -> str | None:
    names: Sequence[str] = head.column_names
    if named == "none" and role in ("group", "split"):
        return None
    if named is not None and named not in names:
        raise ConfigError(f"--{role} {named}: no such column; {choices(named, names)}")
    return named or next((name for name in _ROLE_NAMES[role] if name in names), None)


def _with_sound(dataset: Dataset, head: pa.Table) -> list[Modality]:
    """Leave out the sound of a video column when its first clips have none."""
    kept = []
    for modality in dataset.modalities:
        twins = [other for other in dataset.modalities if other.column == modality.column]
        if modality.kind == "audio" and len(twins) == 2 and not _any_sound(dataset, head, modality):
            log.info("%s: no sound in the first %d clips; the sight alone is read", modality.column, _SOUND_TRIALS)
        else:
            kept.append(modality)
    return kept


def _any_sound(dataset: Dataset, head: pa.Table, modality: Modality) -> bool:
    readable = 0
    for cell in head[modality.column].to_pylist()[:_SOUND_TRIALS]:
        try:
            if has_sound(dataset.load(cell, modality)):
                return True
            readable += 1
        except UnusableError:
            continue
    return readable == 0  # nothing could be opened: leave the verdict to the quarantine


def _with_length(dataset: Dataset, modality: Modality) -> Modality:
    """Fix the length of a feature vector: the type's, else the one that most rows have."""
    if modality.kind != "features":
        return modality
    type_ = dataset.schema.field(modality.column).type
    if pa.types.is_fixed_size_list(type_):
        return replace(modality, length=type_.list_size)
    counts: dict[int, int] = {}
    for shard in dataset.shards:
        lengths = pc.value_counts(pc.list_value_length(shard.read([modality.column])[modality.column]))
        for entry in lengths.to_pylist():
            if entry["values"]:
                counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    if not counts:
        raise DatasetError(f"{dataset.source}: column {modality.column!r} holds no vector")
    return replace(modality, length=max(counts, key=lambda length: (counts[length], -length)))
