"""Samples of a dataset: ids, labels, splits and groups, read without opening any media."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DatasetError
from ..hashing import hash_rank
from ..row_arrays import count_codes, gather, slices, sorted_pieces, stable_order
from .columns import SPLIT_NAMES, SPLITS, compose_ids
from .dataset import Dataset
from .label_columns import ColumnParts, coded_parts, read_class_column, read_number_column, read_set_column
from .labels import Labels, ReadAs, Target, declared_classes
from .modalities import is_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The n samples of a dataset, in dataset order. Strings are numpy object arrays of shape (n,).

    Attributes:
        sample_id: unique ids (n,).
        label: int32 (n,) in [0, c); NO_LABEL where the source has none, UNKNOWN_LABEL where the label is not among the
            source's classes.
        class_names: names of the c classes, sorted by the source's label. For multilabel and regression the classes
            are strata: sets of labels, or deciles.
        split: train, validation or test (n,).
        group: group names (n,); None if the source has no groups.
        paths: the source's columns of file names.
        task: classification, multilabel or regression.
        values: None for classification; multilabel (n, k) of 0 and 1, regression (n, 1); NaN where `label` is negative.
        outputs: names of the k outputs; for classification the classes, k = c.
        unknown: (row, label) of each row with UNKNOWN_LABEL.
    """

    sample_id: NDArray[np.object_]
    label: NDArray[np.int32]
    class_names: tuple[str, ...]
    split: NDArray[np.object_]
    group: NDArray[np.object_] | None
    paths: pa.Table
    task: str = "classification"
    values: NDArray[np.float32] | None = None
    outputs: tuple[str, ...] = ()
    unknown: Sequence[tuple[int, str]] = ()

    def __post_init__(self) -> None:
        repeated = [name for name, count in Counter(self.sample_id).items() if count > 1]
        if repeated:
            raise repeated_ids(repeated)

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def is_test(self) -> NDArray[np.bool_]:
        """Mask (n,) of the test split."""
        return np.asarray(self.split == "test")

    def ids_of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
        """Return the ids of these rows."""
        return np.asarray(self.sample_id[rows])

    def hash_ids(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, id) of each sample (n,)."""
        return hash_rank(self.sample_id, seed=seed, purpose=purpose)

    def hash_rows(self, rows: NDArray[np.integer[Any]], *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, id) of some samples (b,)."""
        return hash_rank(self.sample_id[rows], seed=seed, purpose=purpose)

    @property
    def group_codes(self) -> NDArray[np.intp] | None:
        """Index of each sample's group (n,) in the sorted names; None without groups."""
        return None if self.group is None else np.unique(self.group.astype(str), return_inverse=True)[1]

    def hash_groups(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, name) of each group (g,), in the order of `group_codes`."""
        assert self.group is not None
        return hash_rank(np.unique(self.group.astype(str)).tolist(), seed=seed, purpose=purpose)

    @property
    def target(self) -> Target:
        """Training target of the samples; rows without a label must be removed before a probe is fitted."""
        return Target(task=self.task, label=self.label, num_outputs=len(self.outputs), values=self.values)


def read_samples(dataset: Dataset, *, seed: int, test_fraction: float) -> Samples:
    """Read ids, labels, splits and groups; a source without splits gets a test split by hash(seed, group or id)."""
    columns = dataset.columns
    tables = [(dataset.read(shard, modalities=False), shard) for shard in dataset.shards]
    sample_id = np.array([name for rows, shard in tables for name in dataset.sample_ids(rows, shard)], dtype=object)
    rows = pa.concat_tables([rows for rows, _ in tables], promote_options="permissive")
    for name in columns.id:
        if num_null := rows[name].null_count:
            raise DatasetError(
                f"column {name!r} has {num_null} rows without an id: give each row one, or pass --id none"
            )
    if columns.id and len(set(sample_id)) < len(sample_id):
        repeated = [name for name, count in Counter(sample_id).items() if count > 1]
        raise repeated_ids(repeated, columns=columns.id, way_out=unique_columns(dataset))
    labels = read_labels(dataset, rows)
    group = _read_group(rows[columns.group].to_pylist(), sample_id) if columns.group else None
    if columns.split:
        split = np.array(SPLITS, dtype=object)[
            read_split_codes(ColumnParts.of(rows[columns.split]), name=columns.split)
        ]
    else:
        is_test = stratified_cut(
            sample_id, labels.label, group, fraction=test_fraction, seed=seed, purpose="test split"
        )
        split = np.where(is_test, "test", "train").astype(object)
    return Samples(
        sample_id=sample_id,
        label=labels.label,
        class_names=labels.names,
        split=split,
        group=group,
        paths=rows.select(dataset.path_columns),
        task=dataset.task,
        values=labels.values,
        outputs=labels.outputs,
        unknown=labels.unknown,
    )


def repeated_ids(repeated: Sequence[str], *, columns: Sequence[str] = (), way_out: str | None = None) -> DatasetError:
    """Return the error of ids that are not unique, with the option of --id that makes them so, if there is one."""
    source = f" in {','.join(columns)}" if columns else ""
    hint = f"they are with --id {way_out}" if way_out else "choose another column with --id"
    return DatasetError(
        f"{len(repeated)} ids are repeated{source} ({', '.join(repeated[:3])}): ids must be unique; {hint}"
    )


def unique_columns(dataset: Dataset) -> str | None:
    """Return the value of --id that makes ids unique: the id columns after one of groups or ids, else one column."""
    types = zip(dataset.schema.names, dataset.schema.types, strict=True)
    names = [name for name, type_ in types if (is_text(type_) or pa.types.is_integer(type_)) and "," not in name]
    rows = pa.concat_tables([shard.read(names) for shard in dataset.shards], promote_options="permissive")
    columns = dataset.columns
    others = [name for name in names if name not in columns.names or name == columns.group]
    outer = sorted(name for name in others if name == columns.group or name.lower().endswith("id"))
    for candidate in [*((name, *columns.id) for name in outer), *((name,) for name in others)]:
        has_nulls = any(rows[name].null_count for name in candidate)
        if not has_nulls and len(set(compose_ids(rows, candidate))) == rows.num_rows:
            return ",".join(candidate)
    return None


def stratified_cut(
    sample_id: NDArray[np.object_],
    label: NDArray[np.int32],
    group: NDArray[np.object_] | None,
    *,
    fraction: float,
    seed: int,
    purpose: str,
    at_most: bool = False,
) -> NDArray[np.bool_]:
    """Return a mask (n,) of `fraction` of the rows, at least one, drawn by hash(seed, group or id).

    With groups whole groups are drawn, as closely to the fraction as their order allows, and at least one; without, the
    fraction is the same in every class. at_most: No more rows are drawn than without groups: a group that would exceed
    them is passed over. Where every group would, the mask is False everywhere.
    """
    if group is None:
        keys, codes = hash_rank(sample_id, seed=seed, purpose=purpose), None
    else:
        names, codes = np.unique(group.astype(str), return_inverse=True)
        keys = hash_rank(names.tolist(), seed=seed, purpose=purpose)
    return cut_by_keys(keys, label, codes, fraction=fraction, at_most=at_most)


def cut_by_keys(
    keys: NDArray[np.uint64],
    label: NDArray[np.int32],
    group: NDArray[np.integer[Any]] | None,
    *,
    fraction: float,
    at_most: bool = False,
) -> NDArray[np.bool_]:
    """Return a mask (n,) of `fraction` of the rows as `stratified_cut` does.

    keys: of the rows (n,), or of the groups (g,), of which each row has one, group (n,).
    """
    if group is None:
        return _draw_rows(keys, label, num_drawn=max(1, round(fraction * len(label))))
    sizes, order, drawn = count_codes(group, len(keys)), stable_order(keys), np.zeros(len(keys), dtype=bool)
    if at_most:
        rows_left = max(1, round(fraction * len(label)))
        for index in order.tolist():
            if sizes[index] <= rows_left and drawn.sum() < len(keys) - 1:
                drawn[index] = True
                rows_left -= int(sizes[index])
        return gather(drawn, group)
    total, num_before, num_groups = len(label), 0, 0  # a group is drawn if its middle lies below the fraction
    for part in slices(len(order)):
        own = sizes[order[part]]
        num_groups += int((num_before + np.cumsum(own) - own / 2 < fraction * total).sum())
        num_before += int(own.sum())
    drawn[order[: min(max(1, num_groups), len(keys) - 1)]] = True  # at least one group is not drawn
    return gather(drawn, group)


def _draw_rows(keys: NDArray[np.uint64], label: NDArray[np.int32], *, num_drawn: int) -> NDArray[np.bool_]:
    """Return a mask (n,) of the rows that come first by (rank + 1/2) / size within their class, ties by key.

    The rank is that by key (n,) within the class, so that the share is the same in every class.
    """
    classes = label - label.min(initial=0) if label.min(initial=0) < 0 else label
    sizes = count_codes(classes, int(classes.max(initial=0)) + 1)
    taken, tied = _drawn_of_classes(sizes, num_drawn)
    is_drawn = np.zeros(len(label), dtype=bool)
    num_before = np.zeros(len(sizes), np.int64)
    ties: list[tuple[int, int]] = []
    for rows in sorted_pieces(keys):
        own = classes[rows]
        order = np.argsort(own, kind="stable")
        counts = np.bincount(own, minlength=len(sizes))
        rank = np.empty(len(rows), np.int64)
        rank[order] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        rank += num_before[own]
        is_drawn[rows[rank < taken[own]]] = True
        ties += [(int(keys[row]), int(row)) for row in rows[(rank == taken[own]) & tied[own]]]
        num_before += counts
    for _, row in sorted(ties)[: num_drawn - int(taken.sum())]:
        is_drawn[row] = True
    return is_drawn


def _drawn_of_classes(sizes: NDArray[np.int64], num_drawn: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return how many rows of each class (k,) have one of the smallest values of (rank + 1/2) / size, and where the
    next one has the same value as the last that is drawn, of which only some are."""
    total, present = int(sizes.sum()), np.flatnonzero(sizes)
    width = np.ceil(sizes * (1.5 * len(present) + 2) / total).astype(np.int64) + 2  # rounding moves a share by k / n
    first = np.clip(np.floor(sizes * (num_drawn / total) - 0.5).astype(np.int64) - width, 0, sizes)
    stop = np.minimum(first + 2 * width + 2, sizes)
    number = np.repeat(np.arange(len(sizes)), stop - first)
    rank = np.arange(len(number)) - np.repeat(np.cumsum(stop - first) - (stop - first) - first, stop - first)
    value = (rank + 0.5) / sizes[number]
    last = np.sort(value)[num_drawn - int(first.sum()) - 1]
    taken = first + np.bincount(number[value < last], minlength=len(sizes))
    tied = np.zeros(len(sizes), bool)
    tied[number[value == last]] = True
    return taken, tied


def _read_group(values: Sequence[object], sample_id: NDArray[np.object_]) -> NDArray[np.object_]:
    """Return the groups as strings; a sample whose group is null forms its own group."""
    groups = [name if value is None else str(value) for value, name in zip(values, sample_id, strict=True)]
    return np.array(groups, dtype=object)


def read_labels(dataset: Dataset, rows: pa.Table) -> Labels:
    """Read the labels of rows in memory, with the columns of the label and its name."""
    columns = dataset.columns
    names = ColumnParts.of(rows[columns.label_name]) if columns.label_name else None
    return read_label_parts(dataset, ColumnParts.of(rows[columns.label]), names)


def read_label_parts(
    dataset: Dataset, column: ColumnParts, names: ColumnParts | None, *, read_as: ReadAs | None = None
) -> Labels:
    """Read the labels of rows, and the names of classes; `read_as`: as other rows were read."""
    read_as = read_as or ReadAs()
    if dataset.task == "regression":
        return read_number_column(column, name=dataset.columns.label, edges=read_as.edges)
    declared = declared_classes(dataset.schema, dataset.columns.label)
    if dataset.task == "multilabel":
        return read_set_column(column, declared=declared, classes=dataset.classes, width=read_as.width)
    return read_class_column(column, names, declared=declared, classes=dataset.classes)


def read_split_codes(column: ColumnParts, *, name: str) -> NDArray[np.int8]:
    """Return the split of each row (n,) of a column as its index in SPLITS; raise DatasetError for other names."""
    values, code = coded_parts(column)
    names = [str(value).strip().lower() for value in values]
    unknown = sorted({str(value) for value, text in zip(values, names, strict=True) if text not in SPLIT_NAMES})
    if unknown:
        raise DatasetError(
            f"column {name!r} holds {', '.join(unknown[:3])}; a split is train, validation or test: "
            "rename them, or pass --split none to have a test split cut"
        )
    return gather(np.array([SPLITS.index(SPLIT_NAMES[text]) for text in names], dtype=np.int8), code)
