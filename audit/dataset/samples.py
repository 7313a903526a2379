"""Samples of a dataset: ids, labels, splits and groups, without any media opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DatasetError
from ..hashing import hash_rank
from .columns import SPLIT_NAMES
from .dataset import Dataset
from .labels import Labels, Target, declared_classes, read_classes, read_label_sets, read_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The n samples of a dataset, in its own order. Strings are numpy object arrays of shape (n,).

    `label` is int32 in [0, c), NO_LABEL where the source has none, or UNKNOWN_LABEL where it is not among the source's
    own classes: `unknown` has (row, label) of these. `class_names` (c,) are sorted by the source's label.
    `split` holds train, validation, test; `group` is None where the source has no groups.
    `paths` has the source's columns of file names.

    By `task`: classification has k = c `outputs`, the classes, and no `values`. multilabel has `values` (n, k) of 0
    and 1, and regression (n, 1) as they are; both NaN where `label` is negative. There the classes are strata: sets of
    labels, or tenths by rank.
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
    unknown: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        repeated = [name for name, count in Counter(self.sample_id).items() if count > 1]
        if repeated:
            raise DatasetError(
                f"{len(repeated)} ids stand more than once ({', '.join(repeated[:3])}): "
                "ids must be unique; name another column with --id"
            )

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def target(self) -> Target:
        """What the samples are to be recognised as; rows without a label must be taken out before it is learned."""
        return Target(task=self.task, label=self.label, num_outputs=len(self.outputs), values=self.values)


def read_samples(dataset: Dataset, *, seed: int, test_fraction: float) -> Samples:
    """Read ids, labels, splits and groups; without a split a test split is cut by hash(seed, group or id)."""
    columns = dataset.columns
    ids: list[str] = []
    tables = []
    for shard in dataset.shards:
        rows = dataset.read(shard, modalities=False)
        ids += dataset.sample_ids(rows, shard)
        tables.append(rows)
    rows = pa.concat_tables(tables)
    _check_ids(rows, columns.id)
    labels = _read_labels(dataset, rows)
    sample_id = np.array(ids, dtype=object)
    group = _read_group(rows[columns.group].to_pylist(), sample_id) if columns.group else None
    split = (
        _read_split(rows[columns.split].to_pylist(), column=columns.split)
        if columns.split
        else _cut_test(sample_id, labels.label, group, seed=seed, fraction=test_fraction)
    )
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


def stratify(keys: NDArray[np.uint64], label: NDArray[np.int32]) -> NDArray[np.float64]:
    """Place each row at (rank + 1/2) / size, in (0, 1), of its class ordered by key: even within every class."""
    place = np.empty(len(label))
    order = np.lexsort((keys, label))
    sorted_label = label[order]
    starts = np.flatnonzero(np.r_[True, sorted_label[1:] != sorted_label[:-1]])
    sizes = np.diff(np.r_[starts, len(label)])
    place[order] = (np.arange(len(label)) - np.repeat(starts, sizes) + 0.5) / np.repeat(sizes, sizes)
    return place


def stratified_cut(
    sample_id: NDArray[np.object_],
    label: NDArray[np.int32],
    group: NDArray[np.object_] | None,
    *,
    fraction: float,
    seed: int,
    purpose: str,
) -> NDArray[np.bool_]:
    """Draw `fraction` of the rows, one at least, by hash(seed, group or id): whole groups, or alike of every class."""
    if group is None:
        keys = hash_rank(sample_id, seed=seed, purpose=purpose)
        first = np.lexsort((keys, stratify(keys, label)))[: max(1, round(fraction * len(label)))]
        drawn = np.zeros(len(label), dtype=bool)
        drawn[first] = True
        return drawn
    names, sizes = np.unique(group.astype(str), return_counts=True)
    order = np.argsort(hash_rank(names.tolist(), seed=seed, purpose=purpose), kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order] / 2  # a group goes where its middle falls
    number = max(1, int((before < fraction * sizes.sum()).sum()))
    chosen = order[: min(number, len(names) - 1)]  # one group at least is left
    return np.isin(group.astype(str), names[chosen])


def _read_group(values: Sequence[object], sample_id: NDArray[np.object_]) -> NDArray[np.object_]:
    """Give the groups as strings; a sample whose group is null is a group of its own."""
    named = [name if value is None else str(value) for value, name in zip(values, sample_id, strict=True)]
    return np.array(named, dtype=object)


def _check_ids(rows: pa.Table, column: str | None) -> None:
    if column and rows[column].null_count:
        raise DatasetError(f"column {column!r} has {rows[column].null_count} rows without an id: give each row one")


def _read_labels(dataset: Dataset, rows: pa.Table) -> Labels:
    column = dataset.columns.label
    cells = rows[column].to_pylist()
    if dataset.task == "regression":
        return read_numbers(cells, name=column)
    declared = declared_classes(dataset.schema, column)
    if dataset.task == "multilabel":
        return read_label_sets(cells, declared=declared, classes=dataset.classes)
    names = rows[dataset.columns.label_name].to_pylist() if dataset.columns.label_name else None
    return read_classes(cells, names, declared=declared, classes=dataset.classes)


def _read_split(values: Sequence[object], *, column: str) -> NDArray[np.object_]:
    unknown = sorted({str(value) for value in values if str(value).lower() not in SPLIT_NAMES})
    if unknown:
        raise DatasetError(
            f"column {column!r} holds {', '.join(unknown[:3])}; a split is train, validation or test: "
            "rename them, or pass --split none to have a test split cut"
        )
    return np.array([SPLIT_NAMES[str(value).lower()] for value in values], dtype=object)


def _cut_test(
    sample_id: NDArray[np.object_],
    label: NDArray[np.int32],
    group: NDArray[np.object_] | None,
    *,
    seed: int,
    fraction: float,
) -> NDArray[np.object_]:
    drawn = stratified_cut(sample_id, label, group, fraction=fraction, seed=seed, purpose="test split")
    return np.where(drawn, "test", "train").astype(object)
