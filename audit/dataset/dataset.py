"""Datasets: the rows of a source, and where each modality of a row is stored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ConfigError, DatasetError, choices
from ..media.decode import has_sound
from ..quarantine import UnusableError
from .cells import holds_pictures, load_cell
from .columns import Columns, find_columns
from .formats.readers import plan_source
from .formats.tables import Plan, Shard
from .labels import TASKS
from .modalities import Modality, check_modalities, choose_encoders, infer_modalities, is_text, parse_modality

log = logging.getLogger("mmaudit")

_SOUND_TRIALS = 8  # clips that are opened to see whether a video column has sound


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
    classes: tuple[str, ...] = ()  # all there are; a label outside is quarantined. (): the source's own list, if any
    allow_outside: bool = False
    keep_duplicates: bool = False  # score samples that are the same as another in every modality
    shard_rows: int = 256  # rows of a list of media that are encoded, and lost by Ctrl-C, at once
    test_fraction: float = 0.2  # of a dataset that comes without a split

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"data.task is {self.task!r}; {choices(self.task, TASKS)}")
        if repeated := [name for name in self.classes if self.classes.count(name) > 1]:
            raise ConfigError(f"data.classes names {repeated[0]!r} more than once")
        if self.shard_rows < 1:
            raise ConfigError(f"data.shard_rows is {self.shard_rows}; it must be at least 1")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"data.test_fraction is {self.test_fraction}; it must lie between 0 and 1")


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
    task: str = "classification"
    classes: tuple[str, ...] = ()

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
        wanted = set(self.columns.taken) | set(self.path_columns)
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
        """Give what a cell stands for: a medium, a text, a vector, or the pictures of folders of frames.

        A medium is its bytes, or a MediaFile where it is large; frames are folders, each its pictures in order.
        UnusableError when it is not there; DatasetError for a path that leads outside the dataset's folder, unless
        that is allowed.
        """
        try:
            return load_cell(cell, modality, root=self.root, allow_outside=self.allow_outside)
        except DatasetError as error:
            raise DatasetError(f"{self.source}: {error}") from error


def open_dataset(data: str | Path, config: DataConfig | None = None) -> Dataset:
    """Open any source of samples.

    A folder with a metadata file, or one in each of its folders of splits; csv, jsonl or Parquet, a file or a glob;
    a folder that `datasets` saved; a name on the hub; ROOT[/split]/class/file; WebDataset tars. Modalities are inferred
    from the columns and said aloud, unless `config.modality` names them. Raises DatasetError where the data are not a
    dataset, ConfigError where the config names what is not there.
    """
    config = config or DataConfig()
    plan = plan_source(str(data), shard_rows=config.shard_rows, allow_outside=config.allow_outside)
    if not plan.shards or not plan.head.num_rows:
        raise DatasetError(f"{data} holds no rows")
    roles = {"id": config.id, "label": config.label, "group": config.group, "split": config.split}
    columns = find_columns(plan.head.column_names, roles)
    modalities = _find_modalities(plan, columns, config)
    _check_folders(plan, modalities)
    dataset = Dataset(
        source=str(data),
        root=plan.root,
        modalities=tuple(modalities),
        columns=columns,
        schema=plan.head.schema,
        shards=plan.shards,
        allow_outside=config.allow_outside,
        task=config.task,
        classes=config.classes,
    )
    if not config.modality:
        dataset = replace(dataset, modalities=tuple(_with_sound(dataset, plan.head)))
    check_modalities(dataset.modalities, plan.head.column_names)
    modalities = choose_encoders([_with_length(dataset, modality) for modality in dataset.modalities], config.encoder)
    dataset = replace(dataset, modalities=tuple(modalities))
    log.info("modalities: %s", ", ".join(str(modality) for modality in dataset.modalities))
    return dataset


def _find_modalities(plan: Plan, columns: Columns, config: DataConfig) -> list[Modality]:
    pictured = partial(holds_pictures, root=plan.root)
    if config.modality:
        return [parse_modality(text, plan.head, holds_pictures=pictured) for text in config.modality]
    return infer_modalities(plan.head, taken=columns.taken, holds_pictures=pictured)


def _check_folders(plan: Plan, modalities: Sequence[Modality]) -> None:
    """Refuse files of several folders that name media: their paths could be relative to one of them only."""
    named = [m.column for m in modalities if m.kind != "text" and is_text(plan.head.schema.field(m.column).type)]
    if named and len(plan.folders) > 1:
        raise DatasetError(
            f"the files lie in {len(plan.folders)} folders ({plan.folders[0]}, {plan.folders[1]}), and the paths in "
            f"{named[0]!r} are relative to one: write one metadata file above them"
        )


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
