"""Compact data of the rows of a dataset: tables of each part, and columns of all rows without an object per row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.columns import SPLITS
from ..dataset.dataset import Dataset
from ..dataset.formats import Shard
from ..dataset.labels import Labels, ReadAs, Target, coded_column
from ..dataset.modalities import Modality
from ..dataset.samples import cut_by_keys, read_label_parts, read_split_codes, repeated_ids, unique_columns
from ..errors import DatasetError, Reason
from ..features.cached_matrix import UsableRows, recurring_rows
from ..features.encode import EncodeTask, column_of, content_of, read_arrow
from ..features.encoded_samples import (
    DATA_CHANGED,
    digest_words,
    is_null_cell,
    lengths_of,
    problems_of,
    row_content,
    scorable_rows,
)
from ..features.vectors import check_lengths
from ..hashing import hash_rank
from ..probes.folds import KEY_PURPOSE, fold_purposes
from ..row_arrays import contains, gather, index_type, repeated_in, sorted_pieces, true_rows
from .plan import PartsConfig, plan_parts
from .stored_rows import (
    ReadTable,
    StoredRows,
    code_groups,
    columns_of_parts,
    hash_groups,
    located_tables,
    read_cells,
    read_groups,
    read_hashes,
    sorted_rows,
)

ORDER_PURPOSE, CUT_PURPOSE = "row order", "test split"
_ROLES = ("label", "label_name", "group", "split")


def read_row_table(dataset: Dataset, shards: Sequence[Shard], *, seed: int, repeats: int) -> pa.Table:
    """Read what scoring needs of the rows of some shards, without media: ids, labels, groups, splits and paths.

    The columns are `id`, `hash PURPOSE` of it, uint64, those of the roles, with texts as dictionaries, and `path NAME`.
    Its metadata count the rows without an id, by column.
    """
    purposes = [] if dataset.columns.group else [name for repeat in range(repeats) for name in fold_purposes(repeat)]
    purposes += [KEY_PURPOSE] + [CUT_PURPOSE] * (dataset.columns.split is None and dataset.columns.group is None)
    tables, num_null = [], Counter[str]()
    for shard in shards:
        rows = dataset.read(shard, modalities=False)
        ids = dataset.sample_ids(rows, shard)
        num_null.update({name: rows[name].null_count for name in dataset.columns.id})
        hashes = {name: hash_rank(ids, seed=seed, purpose=name) for name in purposes}
        hashes[ORDER_PURPOSE] = hash_rank(ids, seed=0, purpose=ORDER_PURPOSE)
        columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
        columns |= {f"hash {name}": pa.array(values) for name, values in hashes.items()}
        columns |= {f"path {name}": rows[name] for name in dataset.path_columns}
        for role in _ROLES:
            if name := getattr(dataset.columns, role):
                column = rows[name]
                if role == "group":
                    column = _group_names(column, ids)
                columns[role] = column.dictionary_encode() if _is_text(column.type) else column
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables, promote_options="permissive").unify_dictionaries().combine_chunks()
    return table.replace_schema_metadata({f"null {name}": str(count) for name, count in num_null.items()})


def read_status_table(dataset: Dataset, tasks: Sequence[EncodeTask], rows: pa.Table) -> pa.Table:
    """Read the encoding status of the rows of some shards: content digest, and of each modality usable and missing.

    Its metadata hold the lengths of the vectors of each modality and its first problem. Raises DatasetError if the ids
    of the cache are not those of the row table.
    """
    start = 0
    words: list[NDArray[np.uint64]] = []
    names = [f"{kind} {modality.name}" for kind in ("usable", "missing") for modality in dataset.modalities]
    columns: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in names}
    lengths: dict[str, set[int]] = {modality.name: set() for modality in dataset.modalities}
    problem: dict[str, str] = {}
    for task in tasks:
        contents = []
        ids = rows["id"].slice(start, task.shard.num_rows)
        start += task.shard.num_rows
        for modality in dataset.modalities:
            table = read_arrow(task.file(modality))
            if not table["sample_id"].equals(ids):
                raise DatasetError(DATA_CHANGED)
            contents.append(content_of(table))
            columns[f"usable {modality.name}"].append(
                column_of(table, "reason").is_null().to_numpy(zero_copy_only=False)
            )
            missing = np.zeros(table.num_rows, dtype=bool)
            for row, reason, detail in problems_of(table):
                missing[row] = reason is Reason.NO_TRACK or is_null_cell(reason, detail, modality)
                problem.setdefault(modality.name, f"{reason.value}, {detail}")
            columns[f"missing {modality.name}"].append(missing)
            lengths[modality.name] |= lengths_of(table)
        words.append(digest_words(row_content(contents)))
    high, low = np.concatenate(words, axis=1)
    table = pa.table({"high": high, "low": low, **{name: np.concatenate(parts) for name, parts in columns.items()}})
    stated = {f"lengths {name}": " ".join(map(str, sorted(values))) for name, values in lengths.items()}
    return table.replace_schema_metadata(stated | {f"problem {name}": text for name, text in problem.items()})


def _group_names(column: pa.ChunkedArray, ids: Sequence[str]) -> pa.Array:
    """Return groups as strings; a sample whose group is null forms its own group."""
    values, codes = coded_column(column)
    names = [None if value is None else str(value) for value in values]
    return pa.array([ids[row] if (name := names[code]) is None else name for row, code in enumerate(codes.tolist())])


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowData(StoredRows):
    """Columns of the n rows of a dataset, in dataset order; ids and hashes are read when they are needed.

    label int32 (n,); split int8 (n,), an index in SPLITS; group int32 (n,) in [0, g), in the order of the first rows of
    the groups; None without groups. Other fields: see Samples. At most about 30 bytes a row are held while they are
    read, whatever the number of groups.
    """

    dataset: Dataset
    labels: Labels
    split: NDArray[np.int8]
    group: NDArray[np.int32] | None
    num_groups: int

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        read_rows: ReadTable,
        *,
        num_parts: int,
        seed: int,
        test_fraction: float,
        read_as: ReadAs | None = None,
    ) -> RowData:
        """Read the columns of all parts from their row tables; `read_as`: how labels are read, if known.

        Raises:
            DatasetError: An id is null or not unique, or a label or a split cannot be read.
        """
        num_rows = _check_ids(dataset, read_rows, num_parts=num_parts)
        column = columns_of_parts(read_rows, num_parts, num_rows)
        group, num_groups = code_groups(column("group")) if dataset.columns.group else (None, 0)
        names = column("label_name") if dataset.columns.label_name else None
        labels = read_label_parts(dataset, column("label"), names, read_as=read_as)
        if dataset.columns.split:
            split = read_split_codes(column("split"), name=dataset.columns.split)
        else:
            if group is None:
                keys = read_hashes(read_rows, num_parts, CUT_PURPOSE)
            else:
                keys = hash_groups(read_rows, group, num_groups, seed=seed, purpose=CUT_PURPOSE)
            is_test = cut_by_keys(keys, labels.label, group, fraction=test_fraction)
            split = gather(np.array([SPLITS.index("train"), SPLITS.index("test")], np.int8), is_test.view(np.int8))
        return cls(
            dataset=dataset,
            read_rows=read_rows,
            num_parts=num_parts,
            labels=labels,
            split=split,
            group=group,
            num_groups=num_groups,
        )

    def __len__(self) -> int:
        return len(self.label)

    @property
    def task(self) -> str:
        """classification, multilabel or regression."""
        return self.dataset.task

    @property
    def label(self) -> NDArray[np.int32]:
        """Class or stratum of each row (n,), negative without one."""
        return self.labels.label

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes or strata."""
        return self.labels.names

    @property
    def unknown(self) -> Sequence[tuple[int, str]]:
        """Row and label of each row whose label is not among the classes."""
        return self.labels.unknown

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of a probe."""
        return self.labels.outputs

    @property
    def target(self) -> Target:
        """Training target of all rows; those without a label must be removed before a probe is fitted."""
        num_outputs = len(self.labels.outputs)
        return Target(task=self.task, label=self.label, num_outputs=num_outputs, values=self.labels.values)

    @property
    def is_test(self) -> NDArray[np.bool_]:
        """Mask (n,) of the test split."""
        return np.asarray(self.split == SPLITS.index("test"))

    @property
    def group_codes(self) -> NDArray[np.int32] | None:
        """Index of each row's group (n,); None without groups."""
        return self.group

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups (g,), read anew: an object per group."""
        if self.group is None:
            return ()
        return tuple(name for names in read_groups(self.read_rows, self.group, self.num_groups) for name in names)

    def hash_groups(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, name) of each group (g,)."""
        if self.group is None:
            return np.zeros(0, np.uint64)
        return hash_groups(self.read_rows, self.group, self.num_groups, seed=seed, purpose=purpose)

    def hash_ids(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, id) of each row (n,); the seed is that of the row tables."""
        return read_hashes(self.read_rows, self.num_parts, purpose)

    def texts(self, name: str) -> pa.LargeStringArray:
        """Return the column `id` or `group` of all rows, (n,)."""
        columns = [self.read_rows(index)[name].cast(pa.large_string()) for index in range(self.num_parts)]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks]).combine_chunks()

    def sorted_ids(self) -> Iterator[tuple[NDArray[np.integer[Any]], NDArray[np.uint64]]]:
        """Yield all rows in pieces, in the order of the hashes of their ids, with these."""
        return sorted_rows(self.read_rows, self.num_parts, f"hash {ORDER_PURPOSE}", len(self))

    def canonical_order(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """Return rows in the order of the hashes of their ids, see hashing.canonical_order."""
        hashes = self.hash_rows(rows, seed=0, purpose=ORDER_PURPOSE)
        ordered, start = np.empty(len(rows), index_type(len(self))), 0
        for piece in sorted_pieces(hashes):
            own, own_hashes = rows[piece], hashes[piece]
            for first in np.flatnonzero(np.diff(own_hashes) == 0).tolist():  # of 10^7 ids in one of 370,000 sets
                same = np.flatnonzero(own_hashes == own_hashes[first])
                own[same] = own[same][np.argsort(self.ids_of(own[same]).astype(str))]
            ordered[start : start + len(own)] = own
            start += len(own)
        return ordered


def _check_ids(dataset: Dataset, read_rows: ReadTable, *, num_parts: int) -> int:
    """Raise DatasetError for ids that are null or not unique; return the number of rows."""
    for name in dataset.columns.id:
        metadata = [read_rows(index).schema.metadata or {} for index in range(num_parts)]
        if num_null := sum(int(stated.get(f"null {name}".encode(), b"0")) for stated in metadata):
            raise DatasetError(
                f"column {name!r} has {num_null} rows without an id: give each row one, or pass --id none"
            )
    hashes = read_hashes(read_rows, num_parts, ORDER_PURPOSE)
    num_rows = len(hashes)
    hashes.sort()
    repeated = repeated_in(hashes)
    if not len(repeated):
        return num_rows
    is_repeated = np.zeros(num_rows, bool)
    for part, table in located_tables(read_rows, num_parts):
        is_repeated[part] = contains(repeated, table[f"hash {ORDER_PURPOSE}"].to_numpy())
    ids = read_cells(read_rows, num_parts, "id", true_rows(is_repeated))
    names = [name for name, count in Counter(ids).items() if count > 1]
    if names and dataset.columns.id:
        raise repeated_ids(names, columns=dataset.columns.id, way_out=unique_columns(dataset))
    if names:
        raise repeated_ids(names)
    return num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedData:
    """Rows with their encoding status in m modalities, whose digests are read when they are needed; see EncodedRows."""

    samples: RowData
    tasks: tuple[EncodeTask, ...]
    read_status: ReadTable

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities of the dataset."""
        return self.samples.dataset.modalities

    def _masks(self, kind: str) -> Iterator[tuple[slice, NDArray[np.bool_]]]:
        """Yield the rows of each part, and a mask of them in each modality (rows, m)."""
        names = [f"{kind} {modality.name}" for modality in self.modalities]
        for part, table in located_tables(self.read_status, self.samples.num_parts):
            yield part, np.stack([table[name].to_numpy(zero_copy_only=False) for name in names], axis=1)

    def _read(self, kind: str) -> NDArray[np.bool_]:
        masks = np.empty((len(self.modalities), len(self.samples)), dtype=bool)
        for part, mask in self._masks(kind):
            masks[:, part] = mask.T
        return masks.T

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Whether each modality of each row was encoded, (n, m); each column is contiguous."""
        return self._read("usable")

    @property
    def usable_bits(self) -> NDArray[np.uint8]:
        """Whether each modality of each row was encoded, (n, ceil(m / 8)): a bit each, the first the highest."""
        bits = np.empty((len(self.samples), -(-len(self.modalities) // 8)), np.uint8)
        for part, mask in self._masks("usable"):
            bits[part] = np.packbits(mask, axis=1)
        return bits

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Whether the row lacks the modality in the source, (n, m)."""
        return self._read("missing")

    @property
    def is_scorable(self) -> NDArray[np.bool_]:
        """Which rows (n,) have at least two usable modalities and no damaged one."""
        mask = np.empty(len(self.samples), dtype=bool)
        for (part, usable), (_, missing) in zip(self._masks("usable"), self._masks("missing"), strict=True):
            mask[part] = scorable_rows(usable, missing)
        return mask

    def sorted_contents(self) -> Iterator[tuple[NDArray[np.integer[Any]], NDArray[np.uint64]]]:
        """Yield all rows in pieces, in the order of the first words of their content digests, with these."""
        return sorted_rows(self.read_status, self.samples.num_parts, "high", len(self.samples))

    def content_word(self, number: int, rows: NDArray[np.integer[Any]] | None = None) -> NDArray[np.uint64]:
        """Return the first or the second word of the content digest of these rows (b,), ascending; None: of all."""
        name = ("high", "low")[number]
        words, start = np.empty(len(self.samples) if rows is None else len(rows), np.uint64), 0
        for part, table in located_tables(self.read_status, self.samples.num_parts):
            column = table[name].to_numpy()
            if rows is not None:
                stop = int(np.searchsorted(rows, rows.dtype.type(part.stop)))  # of another type, it would be copied
                column = column[rows[start:stop] - part.start]
            words[start : start + len(column)] = column
            start += len(column)
        return words

    @property
    def is_distinctive(self) -> NDArray[np.bool_]:
        """Which rows (n,) have a modality whose content does not recur by chance; needed where there are copies."""
        is_distinctive, usable = np.zeros(len(self.samples), dtype=bool), np.empty(len(self.samples), dtype=bool)
        for number, modality in enumerate(self.modalities):
            for part, mask in self._masks("usable"):
                usable[part] = mask[:, number]

            def contents(index: int, modality: Modality = modality) -> NDArray[np.bytes_]:
                return content_of(read_arrow(self.tasks[index].file(modality)))

            recurs = recurring_rows(self.tasks, UsableRows(modality=modality, usable=usable), contents)
            np.logical_not(recurs, out=recurs)
            recurs &= usable
            is_distinctive |= recurs
        return is_distinctive

    def problems(self, rows: NDArray[np.bool_]) -> Iterator[tuple[int, str, Reason, str]]:
        """Yield row, modality, reason and detail of what is not usable in the rows of a mask (n,), by modality."""
        for modality in self.modalities:
            for task in self.tasks:
                first = task.shard.first - self.tasks[0].shard.first
                if rows[first : first + task.shard.num_rows].any():
                    for row, reason, detail in problems_of(read_arrow(task.file(modality))):
                        if rows[first + row]:
                            yield first + row, modality.name, reason, detail

    def check(self, num_features: Sequence[int] = ()) -> None:
        """Raise DatasetError if a modality is usable nowhere, or has vectors of several lengths.

        num_features: Of each modality in a run whose probes score the rows: vectors must have as many numbers, and a
            modality may be usable in none of these rows.
        """
        for index, modality in enumerate(self.modalities):
            metadata = [self.read_status(part).schema.metadata or {} for part in range(self.samples.num_parts)]
            lengths = {int(text) for stated in metadata for text in stated[f"lengths {modality.name}".encode()].split()}
            if num_features:
                lengths.add(num_features[index])
            if not lengths:
                stated = next(stated for stated in metadata if f"problem {modality.name}".encode() in stated)
                problem = stated[f"problem {modality.name}".encode()].decode()
                raise DatasetError(f"no sample has a usable {modality.name}; the first: {problem}")
            check_lengths(lengths, modality)


def read_encoded(dataset: Dataset, tasks: Sequence[EncodeTask], *, seed: int, test_fraction: float) -> EncodedData:
    """Read the rows of an encoded dataset and their encoding status into tables in memory, about 100 bytes a row.

    Raises:
        DatasetError: An id is null or not unique, a label or split cannot be read, no sample has a usable modality, or
            the data have changed since they were encoded.
    """
    parts = plan_parts(dataset.shards, config=PartsConfig(), depends_on=()).parts
    rows, statuses = [], []
    for part in parts:
        shards = slice(part.first_shard, part.end_shard)
        rows.append(read_row_table(dataset, dataset.shards[shards], seed=seed, repeats=0))
        statuses.append(read_status_table(dataset, tasks[shards], rows[-1]))
    data = RowData.of(dataset, rows.__getitem__, num_parts=len(parts), seed=seed, test_fraction=test_fraction)
    encoded = EncodedData(samples=data, tasks=tuple(tasks), read_status=statuses.__getitem__)
    encoded.check()
    return encoded
