"""Rows of an encoded dataset that are looked up by their ids, without an object per row of the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.dataset import Dataset
from ..dataset.label_columns import ColumnParts
from ..dataset.labels import ClassReader, Labels, declared_classes
from ..dataset.modalities import Modality
from ..dataset.samples import read_labels, read_split_codes, repeated_ids, unique_columns
from ..errors import DatasetError, Reason
from ..hashing import IdIndex
from .cached_matrix import UsableRows
from .encode import EncodeTask, column_of, content_of, read_arrow
from .encoded_samples import DATA_CHANGED, digest_words, is_null_cell, lengths_of, problems_of, row_content
from .vectors import check_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRows:
    """Rows of a dataset in the order of n ids, and what is known of them; see `find_rows`.

    Attributes:
        row: dataset row of each id (n,), -1 where there is none; nothing else is known of these.
        labels: classes, label sets or numbers of the rows.
        split: index in SPLITS of each row (n,); None where the data state no splits.
        content: digest over all modalities as two words, (n, 2), see `digest_words`.
        usable: of each of the m modalities, which rows of the dataset have it.
        damaged: whether a modality is neither usable nor missing in the source, (n, m).
    """

    row: NDArray[np.int64]
    labels: Labels
    split: NDArray[np.int8] | None
    content: NDArray[np.uint64]
    usable: tuple[UsableRows, ...]
    damaged: NDArray[np.bool_]


def find_rows(dataset: Dataset, tasks: Sequence[EncodeTask], index: IdIndex) -> FoundRows:
    """Look up the rows of n ids in an encoded dataset, shard by shard; no medium is opened.

    Memory is that of the ids and of one shard; of label sets and numbers, also that of the labels of all rows.

    Raises:
        DatasetError: The cache is not that of the dataset; an id is null, or that of a found row is not unique; a
            modality is usable nowhere, or has vectors of several lengths.

    Example:
        >>> found = find_rows(dataset, tasks, IdIndex.of(pa.array(["clip-7"], pa.large_string())))
        >>> found.labels.names[found.labels.label[0]]
        'happy'
    """
    ids, roles = index.ids, dataset.columns
    row = np.full(len(ids), -1, dtype=np.int64)
    content = np.zeros((len(ids), 2), dtype=np.uint64)
    split = np.zeros(len(ids), dtype=np.int8) if roles.split else None
    modalities = [_ModalityReader(modality) for modality in dataset.modalities]
    damaged = np.zeros((len(ids), len(modalities)), dtype=bool)
    labels = _LabelReader(dataset, code=np.zeros(len(ids), dtype=np.int32))
    num_null = dict.fromkeys(roles.id, 0)
    repeated: set[int] = set()
    start = 0
    for task in tasks:
        rows = dataset.read(task.shard, modalities=False)
        for name in roles.id:
            num_null[name] += rows[name].null_count
        shard_ids = pa.array(dataset.sample_ids(rows, task.shard), pa.string())
        positions, local_rows = index.find(shard_ids)
        repeated.update(positions[row[positions] >= 0].tolist())
        row[positions] = start + local_rows
        repeated.update(positions[row[positions] != start + local_rows].tolist())  # twice in this shard
        labels.add(rows, positions, local_rows)
        if split is not None:
            split[positions] = read_split_codes(ColumnParts.of(rows[roles.split]), name=str(roles.split))[local_rows]
        parts = [reader.add(task, shard_ids, local_rows) for reader in modalities]
        content[positions] = digest_words(row_content([part for part, _ in parts])).T
        damaged[positions] = np.stack([part for _, part in parts], axis=1)
        start += task.shard.num_rows
    for name, count in num_null.items():
        if count:
            raise DatasetError(f"column {name!r} has {count} rows without an id: give each row one, or pass --id none")
    if repeated:
        names = ids.take(pa.array(sorted(repeated))).to_pylist()
        raise repeated_ids(names, columns=roles.id, way_out=unique_columns(dataset) if roles.id else None)
    return FoundRows(
        row=row,
        labels=labels.read(row),
        split=split,
        content=content,
        usable=tuple(reader.finish() for reader in modalities),
        damaged=damaged,
    )


@dataclass(slots=True)
class _LabelReader:
    """Labels of found rows: classes by their distinct values, label sets and numbers from the whole column."""

    dataset: Dataset
    code: NDArray[np.int32]
    classes: ClassReader = field(default_factory=ClassReader)
    columns: list[pa.Table] = field(default_factory=list)

    def add(self, rows: pa.Table, positions: NDArray[np.intp], local_rows: NDArray[np.intp]) -> None:
        """Read the labels of a shard, of which `local_rows` are the found rows `positions`."""
        roles = self.dataset.columns
        if self._has_classes(rows):
            names = rows[roles.label_name] if roles.label_name and not self._declared else None
            self.code[positions] = self.classes.add(rows[roles.label], names)[local_rows]
        else:
            self.columns.append(rows.select([name for name in (roles.label, roles.label_name) if name]))

    def read(self, row: NDArray[np.int64]) -> Labels:
        """Return the labels of the found rows, by their rows in the dataset, -1 where there is none."""
        if not self.columns:
            return self.classes.labels(self.code, declared=self._declared, classes=self.dataset.classes)
        labels = read_labels(self.dataset, pa.concat_tables(self.columns, promote_options="permissive"))
        values = None if labels.values is None else labels.values[row]
        return Labels(label=labels.label[row], names=labels.names, outputs=labels.outputs, values=values)

    def _has_classes(self, rows: pa.Table) -> bool:
        is_scalar = not pa.types.is_nested(rows.schema.field(self.dataset.columns.label).type)
        return self.dataset.task == "classification" and is_scalar

    @property
    def _declared(self) -> tuple[str, ...]:
        return declared_classes(self.dataset.schema, self.dataset.columns.label)


@dataclass(slots=True)
class _ModalityReader:
    """Encoding status of a modality, shard by shard."""

    modality: Modality
    usable: list[NDArray[np.bool_]] = field(default_factory=list)
    lengths: set[int] = field(default_factory=set)
    problem: str = ""

    def add(
        self, task: EncodeTask, shard_ids: pa.Array, local_rows: NDArray[np.intp]
    ) -> tuple[NDArray[np.bytes_], NDArray[np.bool_]]:
        """Return content digests of some rows of a shard, and whether they are neither usable nor missing."""
        table = read_arrow(task.file(self.modality))
        if table.num_rows != task.shard.num_rows or not column_of(table, "sample_id").equals(shard_ids):
            raise DatasetError(DATA_CHANGED)
        usable = column_of(table, "reason").is_null().to_numpy(zero_copy_only=False)
        self.usable.append(np.broadcast_to(np.True_, usable.shape) if usable.all() else usable)
        self.lengths |= lengths_of(table)
        damaged = ~usable
        for row, reason, detail in problems_of(table):
            self.problem = self.problem or f"{reason.value}, {detail}"
            damaged[row] = reason is not Reason.NO_TRACK and not is_null_cell(reason, detail, self.modality)
        return content_of(table)[local_rows], damaged[local_rows]

    def finish(self) -> UsableRows:
        """Return which rows of the dataset have the modality. Raises DatasetError if none has."""
        if not self.lengths:
            raise DatasetError(f"no sample has a usable {self.modality.name}; the first: {self.problem}")
        check_lengths(self.lengths, self.modality)
        is_everywhere = all(usable.strides == (0,) for usable in self.usable)
        num_rows = sum(map(len, self.usable))
        usable = np.broadcast_to(np.True_, num_rows) if is_everywhere else np.concatenate(self.usable)
        return UsableRows(modality=self.modality, usable=usable)
