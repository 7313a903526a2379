"""Selection of what is scored: usable rows, copies, folds and training rows, as arrays without an object per row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.columns import SPLITS
from ..dataset.labels import Target
from ..errors import Quarantined, Reason
from ..features.encoded_samples import (
    DIGEST_SUM,
    SORTED_ROWS,
    fingerprint_of,
    fingerprint_of_sums,
    select_usable,
    sort_quarantined,
)
from ..hashing import digest
from ..probes.config import ProbeConfig
from ..probes.cross_fit import CrossFit, plan_cross_fits
from ..scores.stability import target_of
from .row_data import EncodedData


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The n rows that are scored, in the order of the hashes of their ids, and the N rows of the dataset.

    Attributes:
        row: Dataset row of each sample (n,).
        target: Target of the samples.
        classes: The source's label of each class of the target (k,).
        class_names: Names of the source's classes or strata, by label.
        label: The source's label of each sample (n,), also of a stratum.
        split: Index in SPLITS of each sample (n,).
        group: Index of each sample's group (n,); None without groups.
        cross_fits: Folds of each repeat.
        usable: Which modalities each row of the dataset has, (N, m).
        quarantined: Reasons why the other rows are not scored, in the order of the dataset.
        fingerprint: Fingerprint of the dataset.
        sums: Sum of the digests of the rows of each part, which the fingerprint follows from; of large data only.
    """

    row: NDArray[np.intp]
    target: Target
    classes: NDArray[np.int32]
    class_names: tuple[str, ...]
    label: NDArray[np.int32]
    split: NDArray[np.int8]
    group: NDArray[np.int32] | None
    cross_fits: tuple[CrossFit, ...]
    usable: NDArray[np.bool_]
    quarantined: tuple[Quarantined, ...]
    fingerprint: str
    sums: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.row)

    @property
    def num_rows(self) -> int:
        """Number of rows of the dataset, N."""
        return len(self.usable)

    @property
    def not_test(self) -> NDArray[np.bool_]:
        """Mask (n,) of the samples that choices may depend on, all but the test split; all if there is no other."""
        not_test = self.split != SPLITS.index("test")
        return np.asarray(not_test if not_test.any() else ~not_test)

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """Index of each sample's group (n,) in the order of their first samples; None without groups."""
        return None if self.group is None else number_by_occurrence(self.group)

    @property
    def num_groups(self) -> int | None:
        """Number of groups of the samples; None without groups."""
        return None if self.group is None else len(np.unique(self.group))

    @property
    def dataset_order(self) -> NDArray[np.intp]:
        """The samples in the order of the dataset, (n,)."""
        return np.argsort(self.row)

    def samples_in(self, first: int, num_rows: int) -> NDArray[np.intp]:
        """Return the samples among `num_rows` rows of the dataset from row `first`, ascending."""
        return np.flatnonzero((self.row >= first) & (self.row < first + num_rows))


def number_by_occurrence(codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return codes (n,) numbered in the order in which they first occur."""
    return np.asarray(pa.array(codes).dictionary_encode().indices, dtype=np.int64)


def select(encoded: EncodedData, *, probe: ProbeConfig, seed: int, keep_duplicates: bool) -> Selection:
    """Select what is scored, and assign folds; see select_usable and plan_cross_fits."""
    data = encoded.samples
    rows, left_out = select_usable(encoded, keep_duplicates=keep_duplicates)
    rows, cross_fits, rare = plan_cross_fits(data, data.canonical_order(rows), probe, seed=seed)
    target, classes = target_of(data, rows)
    sums = row_sums(encoded) if len(data) > SORTED_ROWS else ()
    is_scored = np.zeros(len(data), dtype=bool)
    is_scored[rows] = True
    return Selection(
        row=rows,
        target=target,
        classes=classes,
        class_names=data.class_names,
        label=data.label[rows],
        split=data.split[rows],
        group=None if data.group is None else data.group[rows],
        cross_fits=tuple(cross_fits),
        usable=encoded.usable,
        quarantined=sort_quarantined(left_out + rare, data.ids_of(np.flatnonzero(~is_scored))),
        fingerprint=fingerprint_of_sums(sums) if sums else fingerprint(encoded),
        sums=sums,
    )


def fingerprint(encoded: EncodedData, *, is_row: NDArray[np.bool_] | None = None) -> str:
    """Return the fingerprint of a dataset, see dataset_fingerprint, with one shard in memory at a time.

    is_row: The rows that it has, a mask (n,) of those of the data; None: all.
    """
    num_rows = len(encoded.samples) if is_row is None else int(is_row.sum())
    return fingerprint_of(_fingerprint_rows(encoded, is_row), num_rows=num_rows)


def fingerprints_of(encoded: EncodedData, is_row: NDArray[np.bool_]) -> tuple[str, str]:
    """Return the fingerprints of the rows in a mask (N,) and of all, of data of at most SORTED_ROWS, read once."""
    rows = list(_fingerprint_rows(encoded, None))
    of_mask = fingerprint_of(compress(rows, is_row.tolist()), num_rows=int(is_row.sum()))
    return of_mask, of_mask if is_row.all() else fingerprint_of(rows, num_rows=len(rows))


def row_sums(encoded: EncodedData, *, is_row: NDArray[np.bool_] | None = None) -> tuple[int, ...]:
    """Return the sum of the digests of the rows of each part, or of those in a mask (N,); see fingerprint_of_sums."""
    rows, sums, first = _fingerprint_rows(encoded, is_row), [], 0
    for part in range(encoded.samples.num_parts):
        end = first + encoded.read_status(part).num_rows
        count = end - first if is_row is None else int(is_row[first:end].sum())
        sums.append(sum(int(digest(row), 16) for row in islice(rows, count)) % DIGEST_SUM)
        first = end
    return tuple(sums)


def _fingerprint_rows(encoded: EncodedData, is_row: NDArray[np.bool_] | None) -> Iterator[bytes]:
    data = encoded.samples
    class_names = (*data.class_names, "", "")  # negative labels index the last two
    groups = ("",) if data.group is None else data.group_names
    first = 0
    for part in range(data.num_parts):
        contents = content_digests(encoded.read_status(part))
        end = first + len(contents)
        rows = np.arange(first, end)
        if is_row is not None:
            rows = rows[is_row[first:end]]
            contents = [contents[row] for row in (rows - first).tolist()]
        group = np.zeros(len(rows), dtype=np.int32) if data.group is None else data.group[rows]
        columns = (data.ids_of(rows), data.label[rows].tolist(), data.split[rows].tolist(), group.tolist(), contents)
        for name, label, split, code, content in zip(*columns, strict=True):
            yield "\0".join((name, class_names[label], SPLITS[split], groups[code], content)).encode()
        first = end


def content_digests(status: pa.Table) -> list[str]:
    """Return the content digest of each row of a status table, 32 hexadecimal digits."""
    words = np.stack([status["high"].to_numpy(), status["low"].to_numpy()], axis=1).astype(">u8")
    text = words.tobytes().hex()
    return [text[start : start + 32] for start in range(0, len(text), 32)]


def selection_tables(selection: Selection) -> tuple[pa.Table, pa.Table]:
    """Return a selection as the tables of its n samples and of the N rows of the dataset."""
    first = selection.cross_fits[0]
    columns: dict[str, Any] = {"row": selection.row, "label": selection.label, "split": selection.split}
    columns |= {"target": selection.target.label, "fits": first.fits, "key": first.key}
    if selection.group is not None:
        columns["group"] = selection.group
    for repeat, cross_fit in enumerate(selection.cross_fits):
        columns |= {f"fold {repeat}": cross_fit.fold, f"inner {repeat}": cross_fit.inner}
    if (values := selection.target.values) is not None:
        columns |= {f"value {output}": values[:, output] for output in range(values.shape[1])}
    rows = {f"usable {index}": column for index, column in enumerate(selection.usable.T)}
    return pa.table(columns), pa.table(rows)


def selection_record(selection: Selection) -> dict[str, Any]:
    """Return what of a selection is not a column, as JSON values."""
    return {
        "task": selection.target.task,
        "num_outputs": selection.target.num_outputs,
        "num_folds": [cross_fit.num_folds for cross_fit in selection.cross_fits],
        "classes": selection.classes.tolist(),
        "class_names": list(selection.class_names),
        "fingerprint": selection.fingerprint,
        "sums": [f"{value:x}" for value in selection.sums],
        "quarantined": [
            [entry.sample_id, entry.modality, entry.reason.value, entry.detail] for entry in selection.quarantined
        ],
    }


def read_selection(samples: pa.Table, rows: pa.Table, record: dict[str, Any]) -> Selection:
    """Build a selection from its tables and its record, without copies of the columns."""
    fits, key = samples["fits"].to_numpy(zero_copy_only=False), samples["key"].to_numpy()
    names = samples.column_names
    values = [samples[name].to_numpy() for name in names if name.startswith("value ")]
    target = Target(
        task=record["task"],
        label=samples["target"].to_numpy(),
        num_outputs=record["num_outputs"],
        values=np.stack(values, axis=1) if values else None,
    )
    cross_fits = [
        CrossFit(
            fold=samples[f"fold {repeat}"].to_numpy(),
            inner=samples[f"inner {repeat}"].to_numpy(),
            fits=fits,
            key=key,
            num_folds=num_folds,
        )
        for repeat, num_folds in enumerate(record["num_folds"])
    ]
    return Selection(
        row=samples["row"].to_numpy(),
        target=target,
        classes=np.array(record["classes"], dtype=np.int32),
        class_names=tuple(record["class_names"]),
        label=samples["label"].to_numpy(),
        split=samples["split"].to_numpy(),
        group=samples["group"].to_numpy() if "group" in names else None,
        cross_fits=tuple(cross_fits),
        usable=np.stack([column.to_numpy(zero_copy_only=False) for column in rows.columns], axis=1),
        quarantined=tuple(
            Quarantined(sample_id=name, modality=modality, reason=Reason(reason), detail=detail)
            for name, modality, reason, detail in record["quarantined"]
        ),
        fingerprint=record["fingerprint"],
        sums=tuple(int(text, 16) for text in record["sums"]),
    )
