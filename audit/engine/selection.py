"""Selection of what is scored: usable rows, copies, folds and training rows, as arrays without an object per row."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.columns import SPLITS
from ..dataset.labels import PackedSets, Target
from ..errors import Quarantined, ScoreError, quarantine_table
from ..features.encode import column_of
from ..features.encoded_samples import DIGEST_SUM, SORTED_ROWS, fingerprint_of, fingerprint_of_sums, usable_rows
from ..features.left_out import LeftOut, QuarantineTable
from ..hashing import digest
from ..probes.config import ProbeConfig
from ..probes.cross_fit import CrossFit, no_keys, plan_cross_fits
from ..row_arrays import count_codes, gather, positions_of
from .row_data import EncodedData, RowData
from .stored_rows import StoredRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The n rows that are scored, in the order of the hashes of their ids, and the N rows of the dataset.

    Arrays of one entry a row are as small as their values: numbers of rows of 32 bits below 2^31 rows, folds of 8.

    Attributes:
        row: Dataset row of each sample (n,).
        target: Target of the samples.
        classes: The source's label of each class of the target (k,).
        class_names: Names of the source's classes or strata, by label.
        split: Index in SPLITS of each sample (n,).
        group: Index of each sample's group (n,); None without groups.
        cross_fits: Folds of each repeat. Their keys are zero except while probes are fitted.
        usable_bits: Which modalities each row of the dataset has, (N, ceil(m / 8)): a bit each, the first the highest.
        quarantined: Reasons why the other rows are not scored, in the order of the dataset.
        fingerprint: Fingerprint of the dataset.
        sums: Sum of the digests of the rows of each part, which the fingerprint follows from; of large data only.
        order: The samples in the order of the dataset (n,), if they were sorted before; see dataset_order.
    """

    row: NDArray[np.integer[Any]]
    target: Target
    classes: NDArray[np.int32]
    class_names: tuple[str, ...]
    split: NDArray[np.int8]
    group: NDArray[np.int32] | None
    cross_fits: tuple[CrossFit, ...]
    usable_bits: NDArray[np.uint8]
    quarantined: Sequence[Quarantined]
    fingerprint: str
    sums: tuple[int, ...] = ()
    order: NDArray[np.integer[Any]] | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def label(self) -> NDArray[np.int32]:
        """The source's label of each sample (n,), also of a stratum."""
        return self.label_of(self.target.label)

    def label_of(self, label: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the source's labels of classes or strata of the target (b,)."""
        if self.target.task != "classification" or np.array_equal(self.classes, np.arange(len(self.classes))):
            return label
        return gather(self.classes, label)

    @property
    def num_rows(self) -> int:
        """Number of rows of the dataset, N."""
        return len(self.usable_bits)

    def has_modality(self, index: int) -> NDArray[np.bool_]:
        """Return which rows of the dataset (N,) have a modality."""
        return np.asarray((self.usable_bits[:, index // 8] & (0x80 >> index % 8)).astype(bool))

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
    def dataset_order(self) -> NDArray[np.integer[Any]]:
        """The samples in the order of the dataset, (n,)."""
        if self.order is not None:
            return self.order
        positions = positions_of(self.row, self.num_rows)
        return positions[positions >= 0]

    def samples_in(self, first: int, num_rows: int) -> NDArray[np.intp]:
        """Return the samples among `num_rows` rows of the dataset from row `first`, ascending.

        Where they were sorted before, only these samples are read, and some forty others to find them.
        """
        order = self.dataset_order
        start, stop = (bisect_left(order, end, key=self.row.__getitem__) for end in (first, first + num_rows))
        return np.sort(order[start:stop]).astype(np.intp)


def number_by_occurrence(codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return codes (n,) numbered in the order in which they first occur."""
    return np.asarray(pa.array(codes).dictionary_encode().indices, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRows:
    """The dataset rows that are scored (n,), in the order of the hashes of their ids, their folds, and the others."""

    row: NDArray[np.integer[Any]]
    cross_fits: tuple[CrossFit, ...]
    left_out: LeftOut


def select(encoded: EncodedData, *, probe: ProbeConfig, seed: int, keep_duplicates: bool) -> Selection:
    """Select what is scored, and assign folds; see select_usable and plan_cross_fits."""
    return describe_chosen(encoded, choose_rows(encoded, probe=probe, seed=seed, keep_duplicates=keep_duplicates))


def choose_rows(encoded: EncodedData, *, probe: ProbeConfig, seed: int, keep_duplicates: bool) -> ChosenRows:
    """Choose the rows that are scored, and their folds; the first half of `select`."""
    data = encoded.samples
    rows, left_out = usable_rows(encoded, keep_duplicates=keep_duplicates)
    rows = data.canonical_order(rows)
    rows, cross_fits, rare = plan_cross_fits(data, rows, probe, seed=seed, with_keys=False)
    left_out = left_out.merge(rare).sorted()
    left_out.ids_of = StoredRows(read_rows=data.read_rows, num_parts=data.num_parts).ids_of  # without the columns
    return ChosenRows(row=rows, cross_fits=tuple(cross_fits), left_out=left_out)


def describe_chosen(encoded: EncodedData, chosen: ChosenRows) -> Selection:
    """Add what else is known of the rows that are scored; the second half of `select`."""
    data = encoded.samples
    target, classes = _target_of(data, chosen.row)
    sums = row_sums(encoded) if len(data) > SORTED_ROWS else ()
    return Selection(
        row=chosen.row,
        target=target,
        classes=classes,
        class_names=data.class_names,
        split=gather(data.split, chosen.row),
        group=None if data.group is None else gather(data.group, chosen.row),
        cross_fits=chosen.cross_fits,
        usable_bits=encoded.usable_bits,
        quarantined=chosen.left_out,
        fingerprint=fingerprint_of_sums(sums) if sums else fingerprint(encoded),
        sums=sums,
    )


def _target_of(data: RowData, rows: NDArray[np.integer[Any]]) -> tuple[Target, NDArray[np.int32]]:
    """Return the target of rows, and the source's label of each of its classes, as stability.target_of does."""
    label = gather(data.label, rows)
    if data.task != "classification":
        values: Any = data.labels.values  # packed label sets or a matrix
        values = values.take(rows) if isinstance(values, PackedSets) else gather(values, rows)
        num_outputs = len(data.outputs)
        target = Target(task=data.task, label=label, num_outputs=num_outputs, values=values)
        return target, np.arange(num_outputs, dtype=np.int32)
    occurs = count_codes(label, len(data.class_names)) > 0
    classes = np.flatnonzero(occurs).astype(np.int32)
    if len(classes) < 2:
        raise ScoreError(f"only one class is left to score ({data.class_names[classes[0]]!r}); probes need two")
    if not occurs.all():
        gather((np.cumsum(occurs) - 1).astype(np.int32), label, out=label)
    return Target(task=data.task, label=label, num_outputs=len(classes)), classes


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
    first = 0
    for part in range(data.num_parts):
        contents, table = content_digests(encoded.read_status(part)), data.read_rows(part)
        rows = np.arange(len(contents)) if is_row is None else np.flatnonzero(is_row[first : first + len(contents)])
        taken = pa.array(rows)
        group = [""] * len(rows) if data.group is None else table["group"].take(taken).to_pylist()
        label, split = (values[first : first + len(contents)][rows].tolist() for values in (data.label, data.split))
        for row, name, label_code, split_code, group_name in zip(
            rows.tolist(), table["id"].take(taken).to_pylist(), label, split, group, strict=True
        ):
            yield "\0".join((name, class_names[label_code], SPLITS[split_code], group_name, contents[row])).encode()
        first += len(contents)


def content_digests(status: pa.Table) -> list[str]:
    """Return the content digest of each row of a status table, 32 hexadecimal digits."""
    words = np.stack([status["high"].to_numpy(), status["low"].to_numpy()], axis=1).astype(">u8")
    text = words.tobytes().hex()
    return [text[start : start + 32] for start in range(0, len(text), 32)]


def selection_tables(selection: Selection) -> tuple[pa.Table, pa.Table]:
    """Return a selection as the tables of its n samples and of the N rows of the dataset, but for `quarantined`.

    Columns have the bytes of the arrays, so that they can be mapped into memory: `bits`, `values` and `usable` have
    those of a whole row.
    """
    first = selection.cross_fits[0]
    values: Any = selection.target.values
    columns: dict[str, Any] = {"row": selection.row, "order": selection.dataset_order, "split": selection.split}
    columns |= {"target": selection.target.label, "fits": first.fits.view(np.uint8)}
    if selection.group is not None:
        columns["group"] = selection.group
    for repeat, cross_fit in enumerate(selection.cross_fits):
        columns |= {f"fold {repeat}": cross_fit.fold, f"inner {repeat}": cross_fit.inner}
    if isinstance(values, PackedSets):
        columns["bits"] = _column_of_rows(values.bits)
    elif values is not None:
        columns["values"] = _column_of_rows(np.asarray(values, np.float32))
    return pa.table(columns), pa.table({"usable": _column_of_rows(selection.usable_bits)})


def _column_of_rows(matrix: NDArray[Any]) -> pa.Array:
    """Return a matrix (n, d) as a column of n cells, each the bytes of a row."""
    width = matrix.shape[1] * matrix.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(matrix), [None, pa.py_buffer(np.ascontiguousarray(matrix))]
    )


def _rows_of_column(table: pa.Table, name: str, dtype: type[np.generic]) -> NDArray[Any]:
    """Return the matrix (n, d) of a column of `_column_of_rows`, without a copy."""
    column = column_of(table, name)
    width, size = column.type.byte_width, np.dtype(dtype).itemsize
    if not len(column):
        return np.empty((0, width // size), dtype)
    matrix = np.frombuffer(column.buffers()[1], dtype, len(column) * width // size, column.offset * width)
    return matrix.reshape(len(column), -1)


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
    }


def quarantined_tables(selection: Selection) -> Iterator[pa.Table]:
    """Yield the samples that are not scored as tables of some rows, with the columns of quarantine.parquet."""
    quarantined = selection.quarantined
    if isinstance(quarantined, LeftOut):
        yield from quarantined.tables()
    else:
        yield quarantine_table(quarantined)


def read_selection(samples: pa.Table, rows: pa.Table, quarantined: pa.Table, record: dict[str, Any]) -> Selection:
    """Build a selection from its tables and its record, without copies of the columns."""
    names = samples.column_names
    values: Any = None
    if "bits" in names:
        values = PackedSets(_rows_of_column(samples, "bits", np.uint8), record["num_outputs"])
    elif "values" in names:
        values = _rows_of_column(samples, "values", np.float32)
    target = Target(
        task=record["task"], label=samples["target"].to_numpy(), num_outputs=record["num_outputs"], values=values
    )
    cross_fits = [
        CrossFit(
            fold=samples[f"fold {repeat}"].to_numpy(),
            inner=samples[f"inner {repeat}"].to_numpy(),
            fits=samples["fits"].to_numpy().view(bool),
            key=no_keys(samples.num_rows),
            num_folds=num_folds,
        )
        for repeat, num_folds in enumerate(record["num_folds"])
    ]
    return Selection(
        row=samples["row"].to_numpy(),
        target=target,
        classes=np.array(record["classes"], dtype=np.int32),
        class_names=tuple(record["class_names"]),
        split=samples["split"].to_numpy(),
        group=samples["group"].to_numpy() if "group" in names else None,
        cross_fits=tuple(cross_fits),
        usable_bits=_rows_of_column(rows, "usable", np.uint8),
        quarantined=QuarantineTable(quarantined),
        fingerprint=record["fingerprint"],
        sums=tuple(int(text, 16) for text in record["sums"]),
        order=samples["order"].to_numpy(),
    )
