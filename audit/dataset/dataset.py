"""Datasets: the rows of a source and the location of each modality."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..arrow import dataset_table, flat_vectors, vector_length
from ..errors import ConfigError, DatasetError, UnusableError
from ..parsing import check_choices, check_ranges
from ..remote.paths import AnyPath, RemotePath, is_url
from ..remote.settings import remote_settings
from .cells import CellLoader, check_files
from .columns import Columns, compose_ids, find_columns, text_roles
from .formats import Plan, Shard, plan_source
from .labels import TASKS
from .modalities import (
    FileChecks,
    Modality,
    check_modalities,
    choose_encoders,
    holds_files,
    holds_media,
    infer_modalities,
    is_array,
    is_text,
    is_vector,
    parse_modality,
)
from .not_read import NotRead, find_not_read, log_forms, log_not_read

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How a dataset is read: the roles of its columns, its modalities, and options of reading.

    Args:
        reader: Source format, one of `READERS` or of an installed package; "auto": the built-in readers are asked.
        modality: Modalities as NAME=COLUMN[:KIND], such as audio=wav_path:audio; [] infers them from the columns. Kinds
            are audio, image, video, frames (folders or lists of pictures), features (vectors, or .npy files) and text.
        encoder: Encoders as MODALITY=ENCODER, such as image=resnet18; a modality without one uses `statistics`. Others
            are `hf:MODEL`, `package.module:function` and the encoders of installed packages.
        task: What the label is: classification (one class), multilabel (a set of labels) or regression (a number).
        id: Column of unique sample ids, or several that are unique together, as video_id,clip_id. Not set: sample_id,
            id, uid, key, clip_id, video_id or __key__; without such a column or with "none": the first column of paths,
            else row numbers.
        label: Column of labels. Not set: label, class, category, target, y, label_name, labels or cls.
        group: Column of groups, such as speakers or source videos, which folds and splits keep together. Not set: the
            column `group` if there is one; "none": no groups.
        split: Column of train, validation and test. Not set: the column `split` if there is one; "none", or no such
            column: a test split is cut.
        classes: All classes, by name or number; samples of other classes are quarantined. []: those that the source
            declares, else all labels that occur.
        allow_outside: Whether paths may lead outside the dataset's folder.
        keep_duplicates: Whether to score samples that equal another sample in every modality.
        shard_rows: Rows per shard of media; a shard is encoded at once, and lost if the run is interrupted.
        test_fraction: Share of the samples in the test split that is cut if the dataset has no splits, in (0, 1).

    Raises:
        ConfigError: A value is out of range, or a class is repeated.

    Example:
        >>> config = DataConfig(label="emotion", group="speaker", modality=("voice=wav_path:audio", "words=transcript"))
    """

    reader: str = "auto"
    modality: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()
    task: str = "classification"
    id: str | None = None
    label: str | None = None
    group: str | None = None
    split: str | None = None
    classes: tuple[str, ...] = ()
    allow_outside: bool = False
    keep_duplicates: bool = False
    shard_rows: int = 256
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_choices("data", self, task=TASKS)
        check_ranges("data", self, shard_rows="[1, inf)", test_fraction="(0, 1)")
        if len(set(self.classes)) < len(self.classes):
            repeated = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ConfigError(f"data.classes names {repeated!r} more than once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The rows of a source, their modalities and the roles of their columns; returned by `open_dataset`.

    Media stay on disk: `read` returns the rows of one shard, with paths as stored, and `load` the medium of one
    cell. A shard can be sent to another process.

    Args:
        source: The path, URL, glob or hub name that was opened.
        root: Folder that relative paths start from.
        modalities: The modalities, at least two, each with its name, column, kind and encoder.
        columns: Names of the id, label, group and split columns.
        schema: Arrow schema of the rows.
        shards: Units of reading, in dataset order.
        allow_outside: Whether paths may lead outside `root`.
        task: classification, multilabel or regression.
        classes: Requested classes; (): those of the source.
        not_read: Columns and files that no modality is read from, with the reasons; () if the modalities were named.

    Example:
        >>> dataset = open_dataset("clips")
        >>> for shard in dataset.shards:
        ...     rows = dataset.read(shard)
        ...     ids = dataset.sample_ids(rows, shard)
        ...     for modality in dataset.modalities:
        ...         cells = rows[modality.column].to_pylist()
        ...         media = [dataset.load(cell, modality) for cell in cells]
    """

    source: str
    root: AnyPath
    modalities: tuple[Modality, ...]
    columns: Columns
    schema: pa.Schema
    shards: tuple[Shard, ...] = field(repr=False)
    allow_outside: bool = False
    task: str = "classification"
    classes: tuple[str, ...] = ()
    not_read: tuple[NotRead, ...] = ()

    @property
    def num_rows(self) -> int:
        """Number of samples in the source, usable or not."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def path_columns(self) -> list[str]:
        """Names of the columns that hold paths of media files; they are copied to every table."""
        columns = {modality.column for modality in self.modalities if self.in_files(modality)}
        return [name for name in self.schema.names if name in columns]

    def in_files(self, modality: Modality) -> bool:
        """Return whether the cells of a modality are paths, one per row."""
        is_path = modality.kind != "text" or modality.in_files
        return is_path and is_text(self.schema.field(modality.column).type)

    def holds_data(self, column: str) -> bool:
        """Return whether the cells of a column are media or vectors themselves, not paths or texts."""
        type_ = self.schema.field(column).type
        return holds_media(type_) or is_array(type_)

    def read(self, shard: Shard, *, modalities: bool = True, data: bool = True) -> pa.Table:
        """Read the rows of a shard.

        Args:
            shard: One of `shards`.
            modalities: Whether to read the columns of the modalities, too.
            data: Whether to read those of them whose cells are media or vectors themselves.

        Returns:
            The columns of id, label, group, split and paths, and those of the modalities if `modalities`, as stored.

        Raises:
            DatasetError: The rows cannot be read, or have changed since the dataset was opened.
        """
        columns = set(self.columns.names) | set(self.path_columns)
        if modalities:
            columns |= {m.column for m in self.modalities if data or not self.holds_data(m.column)}
        rows = dataset_table(shard.read([name for name in self.schema.names if name in columns]))
        return text_roles(rows, self.columns)

    def sample_ids(self, rows: pa.Table, shard: Shard) -> list[str]:
        """Return the ids of a shard's rows: the id column, else the first path column, else `row-NUMBER`."""
        if self.columns.id:
            return compose_ids(rows, self.columns.id)
        names = rows[self.path_columns[0]].to_pylist() if self.path_columns else [None] * rows.num_rows
        numbers = range(shard.first, shard.first + rows.num_rows)
        # A row whose path is null is quarantined; the row number keeps its id unique.
        return [f"row-{number:09d}" if name is None else name for name, number in zip(names, numbers, strict=True)]

    def load(self, cell: Any, modality: Modality) -> Any:
        """Load a cell of a modality.

        Args:
            cell: Value of the modality's column: a path, bytes, a struct of both or of samples and rate, a text, a
                vector, a list of pictures, or folder names.
            modality: The modality that the cell belongs to.

        Returns:
            A medium (bytes, or a MediaFile if it is large), a text, a vector, or for frames one tuple of images, in
            order, for each folder.

        Raises:
            UnusableError: The medium is missing.
            DatasetError: A path leads outside the dataset's folder, unless `allow_outside`.
        """
        with self._naming_source():
            return self._loader(modality).load(cell)

    def read_threads(self, modality: Modality, cells: pa.ChunkedArray) -> int:
        """Return the number of threads that load cells ahead: 0 unless they name files at URLs."""
        if not (self.in_files(modality) or modality.kind == "frames"):
            return 0
        is_remote = isinstance(self.root, RemotePath)
        if not is_remote and self.allow_outside and is_text(cells.type):
            is_remote = any(is_url(cell) for cell in cells.slice(0, 1).to_pylist())
        return remote_settings().num_threads if is_remote else 0

    def stamp(self, cell: Any, modality: Modality, source_stamp: str | None) -> str | None:
        """Return a digest of the paths, sizes and times of the files that a cell names; see CellLoader.stamp."""
        with self._naming_source():
            return self._loader(modality).stamp(cell, source_stamp)

    def local_stamps(self, cell: Any, modality: Modality) -> list[tuple[int, int] | None]:
        """Return the sizes and times of the local files that a cell names; see CellLoader.local_stamps."""
        return self._loader(modality).local_stamps(cell)

    def _loader(self, modality: Modality) -> CellLoader:
        return CellLoader(modality=modality, root=self.root, allow_outside=self.allow_outside)

    @contextmanager
    def _naming_source(self) -> Iterator[None]:
        try:
            yield
        except DatasetError as error:
            raise DatasetError(f"{self.source}: {error}") from error


def open_dataset(
    data: str | Path, config: DataConfig | None = None, *, lengths: Mapping[str, int] | None = None
) -> Dataset:
    """Open a dataset: find its rows, the roles of its columns and its modalities; no medium is decoded.

    Args:
        data: A folder with a metadata file, or with one in each folder of a split; a csv, tsv, jsonl or Parquet file
            or a glob or brace pattern of such; a folder saved by `datasets`; a name on the Hugging Face hub; a folder
            ROOT[/split]/class/file; WebDataset tars; or a source that the reader of an installed package recognises,
            if `config.reader` names it.
        config: Roles of the columns and options of reading; by default they are inferred. Inferred modalities are
            logged.
        lengths: Numbers of the vectors of modalities by name, where the data may have none.

    Returns:
        The dataset, with at least one row and two modalities.

    Raises:
        DatasetError: `data` is not a readable dataset, has no label column, or fewer than two modalities.
        ConfigError: The config names a reader, column or modality that does not exist.

    Example:
        A folder `clips` with metadata.csv, whose columns are audio_file_name, image_file_name and emotion:

        >>> dataset = open_dataset("clips", DataConfig(label="emotion"))
        >>> dataset.num_rows
        7442
        >>> [str(modality) for modality in dataset.modalities]
        ['audio=audio_file_name:audio', 'image=image_file_name:image']
    """
    config = config or DataConfig()
    options: dict[str, Any] = {"shard_rows": config.shard_rows, "allow_outside": config.allow_outside}
    plan = plan_source(str(data), reader=config.reader, **options)
    sample = dataset_table(plan.sample)
    if not plan.shards or not sample.num_rows:
        raise DatasetError(f"{data} holds no rows")
    roles = {"id": config.id, "label": config.label, "group": config.group, "split": config.split}
    columns = find_columns(sample.column_names, roles)
    modalities, not_read = _find_modalities(plan, sample, columns, config)
    dataset = Dataset(
        source=str(data),
        root=plan.root,
        modalities=modalities,
        columns=columns,
        schema=sample.schema,
        shards=plan.shards,
        allow_outside=config.allow_outside,
        task=config.task,
        classes=config.classes,
        not_read=not_read,
    )
    if (names := dataset.path_columns) and len(plan.folders) > 1:
        raise DatasetError(
            f"the files lie in {len(plan.folders)} folders ({plan.folders[0]}, {plan.folders[1]}), and the paths in "
            f"{names[0]!r} are relative to one: write one metadata file above them"
        )
    if not config.modality:
        dataset = replace(dataset, modalities=tuple(_drop_silent_audio(dataset, sample)))
    check_modalities(dataset.modalities, sample.column_names)
    with_length = [_set_vector_length(dataset, modality, sample, lengths or {}) for modality in dataset.modalities]
    dataset = replace(dataset, modalities=tuple(choose_encoders(with_length, config.encoder)))
    log.info("modalities: %s", ", ".join(map(str, dataset.modalities)))
    log_forms(dataset.modalities, sample)
    return dataset


def _find_modalities(
    plan: Plan, sample: pa.Table, columns: Columns, config: DataConfig
) -> tuple[tuple[Modality, ...], tuple[NotRead, ...]]:
    """Return the modalities that are named, or else inferred from a sample, and what is then left; log the latter."""
    files = check_files(plan.root, allow_outside=config.allow_outside)
    if config.modality:
        return tuple(parse_modality(text, sample, files=files) for text in config.modality), ()
    media_ids = [name for name in columns.id if _names_files(sample, name, files)]
    excluded = [name for name in columns.names if name not in media_ids]  # a column of media files may be the id, too
    modalities = infer_modalities(sample, excluded=excluded, files=files)
    not_read = (*plan.not_read, *find_not_read(sample, modalities, roles=columns.names, files=files))
    log_not_read(not_read)
    return tuple(modalities), not_read


def _names_files(sample: pa.Table, column: str, files: FileChecks) -> bool:
    """Return whether a column holds paths of which one at least is there: ids may look like paths of no file."""
    if not holds_files(sample, sample.schema.field(column)):
        return False
    return any(isinstance(cell, str) and files.exists(cell) for cell in sample[column].to_pylist())


def _drop_silent_audio(dataset: Dataset, sample: pa.Table) -> list[Modality]:
    """Return the modalities without the audio of a video column of whose clips none has sound."""
    modalities = []
    for modality in dataset.modalities:
        same_column = [candidate for candidate in dataset.modalities if candidate.column == modality.column]
        if modality.kind == "audio" and len(same_column) == 2:
            cells = pc.drop_null(sample[modality.column]).to_pylist()
            if not _has_any_sound(dataset, cells, modality):
                column = modality.column
                log.info(
                    "%s: no sound in %d clips spread over the source: only the frames are read; "
                    "--modality audio=%s:audio reads sound all the same",
                    *(column, len(cells), column),
                )
                continue
        modalities.append(modality)
    return modalities


def _has_any_sound(dataset: Dataset, cells: Iterable[Any], modality: Modality) -> bool:
    from ..media.audio import has_sound

    num_readable = 0
    for cell in cells:
        try:
            if has_sound(dataset.load(cell, modality)):
                return True
            num_readable += 1
        except UnusableError:
            continue
    # No clip could be opened: keep the modality, the rows are quarantined later with their reasons.
    return num_readable == 0


def _set_vector_length(dataset: Dataset, modality: Modality, sample: pa.Table, lengths: Mapping[str, int]) -> Modality:
    """Set the length of a feature vector: that of the column type, else the most frequent, else that in `lengths`."""
    if modality.kind != "features":
        return modality
    type_ = dataset.schema.field(modality.column).type
    if not is_text(type_) and (length := vector_length(type_)) is not None:
        return replace(modality, length=length)
    rows_of_length: Counter[int] = Counter()
    if is_text(type_):
        rows_of_length.update(_file_lengths(dataset, modality, sample))
    else:
        for shard in dataset.shards:
            rows_of_length.update(_list_lengths(shard.read([modality.column])[modality.column]))
    if not rows_of_length and modality.name in lengths:
        return replace(modality, length=lengths[modality.name])
    if not rows_of_length:
        raise DatasetError(f"{dataset.source}: column {modality.column!r} holds no vector")
    return replace(modality, length=max(rows_of_length, key=lambda length: (rows_of_length[length], -length)))


def _file_lengths(dataset: Dataset, modality: Modality, sample: pa.Table) -> Iterator[int]:
    """Yield the number of numbers in the .npy files of some rows, by their headers."""
    shape_of = check_files(dataset.root, allow_outside=dataset.allow_outside).array_shape
    for name in pc.drop_null(sample[modality.column]).to_pylist():
        if shape := shape_of(name):
            yield math.prod(shape)


def _list_lengths(column: pa.ChunkedArray) -> dict[int, int]:
    """Return how many rows of a column of lists have each number of numbers; empty ones and nulls are left out."""
    if is_vector(column.type):
        counts = pc.value_counts(pc.list_value_length(column)).to_pylist()
        return {row["values"]: row["counts"] for row in counts if row["values"]}
    _, offsets, _ = flat_vectors(column)
    return {length: count for length, count in Counter(np.diff(offsets).tolist()).items() if length}
