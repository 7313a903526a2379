"""Compact data of the rows of a dataset: tables of each part, and columns of all rows without an object per row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.columns import SPLITS
from ..dataset.dataset import Dataset
from ..dataset.formats import Shard
from ..dataset.labels import Labels, Target, coded_column
from ..dataset.modalities import Modality
from ..dataset.samples import cut_by_keys, read_labels, read_split_codes, repeated_ids, unique_columns
from ..errors import DatasetError, Reason
from ..features.encode import EncodeTask, column_of, content_of, read_arrow
from ..features.encoded_samples import (
    DATA_CHANGED,
    digest_words,
    is_null_cell,
    lengths_of,
    problems_of,
    read_status,
    row_content,
)
from ..features.vectors import check_lengths
from ..hashing import hash_rank
from ..probes.cross_fit import KEY_PURPOSE, fold_purposes

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


ReadTable = Callable[[int], pa.Table]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowData:
    """Columns of the n rows of a dataset, in dataset order; ids and hashes are read when they are needed.

    label int32 (n,); split int8 (n,), an index in SPLITS; group int32 (n,) in [0, g), an index in `group_names`; None
    without groups. Other fields: see Samples.
    """

    dataset: Dataset
    read_rows: ReadTable
    num_parts: int
    labels: Labels
    split: NDArray[np.int8]
    group: NDArray[np.int32] | None
    group_names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        read_rows: ReadTable,
        *,
        num_parts: int,
        seed: int,
        test_fraction: float,
        edges: Sequence[float] = (),
    ) -> RowData:
        """Read the columns of all parts from their row tables; `edges` of a regression's strata, if known.

        Raises:
            DatasetError: An id is null or not unique, or a label or a split cannot be read.
        """
        _check_ids(dataset, read_rows, num_parts=num_parts)
        column = _column_of_parts(read_rows, num_parts)
        labels = _read_labels(dataset, column, edges)
        group: NDArray[np.int32] | None = None
        names: tuple[str, ...] = ()
        if dataset.columns.group:
            values, group = coded_column(column("group"))
            names = tuple(map(str, values))
        if dataset.columns.split:
            split = read_split_codes(column("split"), name=dataset.columns.split)
        else:
            purpose = f"hash {CUT_PURPOSE}"
            keys = column(purpose).to_numpy() if group is None else hash_rank(names, seed=seed, purpose=CUT_PURPOSE)
            is_test = cut_by_keys(keys, labels.label, group, fraction=test_fraction)
            split = np.where(is_test, SPLITS.index("test"), SPLITS.index("train")).astype(np.int8)
        return cls(
            dataset=dataset,
            read_rows=read_rows,
            num_parts=num_parts,
            labels=labels,
            split=split,
            group=group,
            group_names=names,
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
    def unknown(self) -> tuple[tuple[int, str], ...]:
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

    def hash_groups(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, name) of each group (g,)."""
        return hash_rank(self.group_names, seed=seed, purpose=purpose)

    def hash_ids(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, id) of each row (n,); the seed is that of the row tables."""
        return _read_hashes(self.read_rows, self.num_parts, purpose)

    def ids_of(self, rows: NDArray[np.intp]) -> NDArray[np.object_]:
        """Return the ids of some rows, in their order."""
        return _ids_of(self.read_rows, self.num_parts, rows)

    def canonical_order(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return rows in the order of the hashes of their ids, see hashing.canonical_order."""
        hashes = self.hash_ids(seed=0, purpose=ORDER_PURPOSE)[rows]
        order = np.argsort(hashes, kind="stable")
        ordered, hashes = rows[order], hashes[order]
        for start in np.flatnonzero(np.diff(hashes) == 0).tolist():  # of 10^7 ids in one of 370,000 sets
            same = slice(start, start + int((hashes[start:] == hashes[start]).argmin() or len(hashes) - start))
            ordered[same] = ordered[same][np.argsort(self.ids_of(ordered[same]).astype(str))]
        return ordered


def _ids_of(read_rows: ReadTable, num_parts: int, rows: NDArray[np.intp]) -> NDArray[np.object_]:
    names = np.empty(len(rows), dtype=object)
    first = 0
    for index in range(num_parts if len(rows) else 0):
        ids = read_rows(index)["id"]
        inside = np.flatnonzero((rows >= first) & (rows < first + len(ids)))
        if len(inside):
            names[inside] = ids.take(pa.array(rows[inside] - first)).to_pylist()
        first += len(ids)
    return names


def _read_hashes(read_rows: ReadTable, num_parts: int, purpose: str) -> NDArray[np.uint64]:
    return np.concatenate([np.array(read_rows(index)[f"hash {purpose}"].to_numpy()) for index in range(num_parts)])


def _column_of_parts(read_rows: ReadTable, num_parts: int) -> Callable[[str], pa.ChunkedArray]:
    """Return a function that reads a column of all parts."""

    def column(name: str) -> pa.ChunkedArray:
        tables = [read_rows(index).select([name]) for index in range(num_parts)]
        return pa.concat_tables(tables, promote_options="permissive")[name]

    return column


def _read_labels(dataset: Dataset, column: Callable[[str], pa.ChunkedArray], edges: Sequence[float]) -> Labels:
    roles = dataset.columns
    columns = {roles.label: column("label")}
    if roles.label_name:
        columns[roles.label_name] = column("label_name")
    return read_labels(dataset, pa.table(columns), edges=edges)


def _check_ids(dataset: Dataset, read_rows: ReadTable, *, num_parts: int) -> None:
    """Raise DatasetError for ids that are null or not unique."""
    for name in dataset.columns.id:
        metadata = [read_rows(index).schema.metadata or {} for index in range(num_parts)]
        if num_null := sum(int(stated.get(f"null {name}".encode(), b"0")) for stated in metadata):
            raise DatasetError(
                f"column {name!r} has {num_null} rows without an id: give each row one, or pass --id none"
            )
    hashes = np.sort(_read_hashes(read_rows, num_parts, ORDER_PURPOSE))
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(repeated):
        return
    rows = np.flatnonzero(np.isin(_read_hashes(read_rows, num_parts, ORDER_PURPOSE), repeated))
    names = [name for name, count in Counter(_ids_of(read_rows, num_parts, rows)).items() if count > 1]
    if names and dataset.columns.id:
        raise repeated_ids(names, columns=dataset.columns.id, way_out=unique_columns(dataset))
    if names:
        raise repeated_ids(names)


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

    def _read(self, kind: str) -> NDArray[np.bool_]:
        masks = np.empty((len(self.samples), len(self.modalities)), dtype=bool)
        start = 0
        for index in range(self.samples.num_parts):
            table = self.read_status(index)
            for number, modality in enumerate(self.modalities):
                column = table[f"{kind} {modality.name}"].to_numpy(zero_copy_only=False)
                masks[start : start + len(table), number] = column
            start += table.num_rows
        return masks

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Whether each modality of each row was encoded, (n, m)."""
        return self._read("usable")

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Whether the row lacks the modality in the source, (n, m)."""
        return self._read("missing")

    def content_word(self, number: int) -> NDArray[np.uint64]:
        """Return the first or the second word of the content digest of each row, (n,)."""
        name = ("high", "low")[number]
        tables = range(self.samples.num_parts)
        return np.concatenate([np.array(self.read_status(index)[name].to_numpy()) for index in tables])

    @property
    def recurs(self) -> NDArray[np.bool_]:
        """Whether the content of each modality recurs by chance, (n, m); needed only where there are copies."""
        statuses = [read_status(self.tasks, modality, None) for modality in self.modalities]
        return np.stack([status.recurs for status in statuses], axis=1)

    def problems(self, rows: NDArray[np.bool_]) -> Iterator[tuple[int, str, Reason, str]]:
        """Yield row, modality, reason and detail of what is not usable in the rows of a mask (n,), by modality."""
        for modality in self.modalities:
            for task in self.tasks:
                first = task.shard.first - self.tasks[0].shard.first
                if rows[first : first + task.shard.num_rows].any():
                    for row, reason, detail in problems_of(read_arrow(task.file(modality))):
                        if rows[first + row]:
                            yield first + row, modality.name, reason, detail

    def check(self) -> None:
        """Raise DatasetError if a modality is usable nowhere, or has vectors of several lengths."""
        for modality in self.modalities:
            metadata = [self.read_status(index).schema.metadata or {} for index in range(self.samples.num_parts)]
            lengths = {int(text) for stated in metadata for text in stated[f"lengths {modality.name}".encode()].split()}
            if not lengths:
                stated = next(stated for stated in metadata if f"problem {modality.name}".encode() in stated)
                problem = stated[f"problem {modality.name}".encode()].decode()
                raise DatasetError(f"no sample has a usable {modality.name}; the first: {problem}")
            check_lengths(lengths, modality)
