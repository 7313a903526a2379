"""Feature matrices in the feature cache on disk, and contents that recur in them by chance.

Equal contents of such rows are no sign of a copy. All rules here are mmaudit's own. n samples, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..dataset.modalities import Modality
from ..row_arrays import gather, sorted_pieces, true_rows
from .encode import EncodeTask, column_of, read_arrow
from .matrix import Inputs, MatrixInputs, RowIndex, TermInputs, chunks
from .vectors import count_terms, holds_terms, keep_buckets, weigh_terms


class ModalityRows(Protocol):
    """Which rows of a dataset have a modality: a Status, or UsableRows."""

    @property
    def modality(self) -> Modality:
        """The modality."""

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Whether each row has it (n,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsableRows:
    """Which rows have a modality, usable (n,)."""

    modality: Modality
    usable: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMatrix:
    """One modality of n samples in the feature cache; rows without the modality read as NaN.

    row: dataset row of each sample (n,). shard_starts: first dataset row of each shard, and the end (s + 1,).
    columns: the columns that are read, (d,); None: all. Of hashed terms these are the buckets of their dense vectors.
    """

    tasks: tuple[EncodeTask, ...]
    status: ModalityRows
    row: RowIndex
    shard_starts: RowIndex
    num_features: int
    columns: RowIndex | None = None

    @classmethod
    def of(
        cls, tasks: Sequence[EncodeTask], status: ModalityRows, row: RowIndex, *, num_features: int | None = None
    ) -> FeatureMatrix:
        """Open the vectors of these dataset rows, of which one must be usable, unless `num_features` is known."""
        shard_starts = np.cumsum([0, *(task.shard.num_rows for task in tasks)])
        opened = cls(tasks=tuple(tasks), status=status, row=row, shard_starts=shard_starts, num_features=0)
        if num_features is not None:
            return replace(opened, num_features=num_features)
        first = row[np.argmax(status.usable[row])]
        if opened.has_terms:
            return replace(opened, num_features=tasks[0].media.text_buckets)
        shard = int(np.searchsorted(shard_starts, first, side="right")) - 1
        vector = read_arrow(tasks[shard].file(status.modality))["vector"][int(first - shard_starts[shard])]
        return replace(opened, num_features=len(vector))

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return len(self.row)

    @property
    def present(self) -> NDArray[np.bool_]:
        """Mask (n,) of the samples that have this modality."""
        return gather(self.status.usable, self.row)

    def take(self, rows: RowIndex) -> FeatureMatrix:
        """Return the matrix of these rows, in this order."""
        return replace(self, row=self.row[rows])

    def select_columns(self, columns: RowIndex) -> FeatureMatrix:
        """Return the matrix of the same rows with these of its columns, (c,), in this order."""
        selected = columns if self.columns is None else self.columns[columns]
        return replace(self, columns=selected, num_features=len(selected))

    @property
    def has_terms(self) -> bool:
        """Whether the modality is stored as hashed terms of texts."""
        return holds_terms(self.status.modality)

    @property
    def num_numbers(self) -> int:
        """Number of features without those of texts."""
        return 0 if self.has_terms else self.num_features

    def read_numbers(self, rows: RowIndex) -> NDArray[Any]:
        """Read the features of these rows without those of texts."""
        return np.zeros((len(rows), 0), np.float32) if self.has_terms else self.read(rows)

    def read_terms(self, rows: RowIndex) -> csr_array | None:
        """Read the weights of terms of these rows: (len(rows), NUM_TERMS); None if it has none."""
        return weigh_terms(self.read_counts(rows)) if self.has_terms else None

    def in_memory(self, rows: RowIndex) -> Inputs:
        """Read these rows into memory."""
        if self.has_terms:
            present, num_buckets = self.present[rows], self._num_buckets
            counts = self.read_counts(rows)
            return TermInputs(counts=counts, present=present, num_buckets=num_buckets, columns=self.columns)
        return MatrixInputs(matrix=self.read(rows))

    def reading_order(self, rows: RowIndex) -> RowIndex:
        """Return the order (b,) in which these rows are read sequentially from their files."""
        return np.argsort(self.row[rows], kind="stable")

    def read_counts(self, rows: RowIndex) -> csr_array:
        """Read how often each term occurs in these rows: (len(rows), NUM_TERMS), empty where missing."""
        codes, lengths = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
        order = np.zeros(0, np.intp)
        for shard, positions, dataset_rows in self._by_shard(rows):
            vector = column_of(read_arrow(self.tasks[shard].file(self.status.modality)), "vector")
            offsets = vector.offsets.to_numpy()
            start = offsets[dataset_rows - self.shard_starts[shard]]
            lengths.append(offsets[dataset_rows - self.shard_starts[shard] + 1] - start)
            skipped = np.repeat(start - np.cumsum(lengths[-1]) + lengths[-1], lengths[-1])
            codes.append(vector.values.to_numpy()[skipped + np.arange(len(skipped))])
            order = np.concatenate([order, positions])
        counts = count_terms(np.concatenate(codes), np.concatenate(lengths))[np.argsort(order)]
        return counts if self.columns is None else keep_buckets(counts, self._num_buckets, self.columns)

    @property
    def _num_buckets(self) -> int:
        """Length of the dense vectors of hashed terms."""
        return self.tasks[0].media.text_buckets

    def _by_shard(self, rows: RowIndex) -> Iterator[tuple[int, RowIndex, RowIndex]]:
        """Yield each shard with the positions in `rows` that it holds, and their dataset rows."""
        dataset_rows = self.row[rows]
        shard = np.searchsorted(self.shard_starts, dataset_rows, side="right") - 1
        order = np.argsort(shard, kind="stable")
        for positions in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1) if len(rows) else []:
            yield int(shard[positions[0]]), positions, dataset_rows[positions]

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        if self.has_terms:
            return self.in_memory(rows).read(np.arange(len(rows)))
        features: NDArray[Any] | None = None
        for shard, positions, dataset_rows in self._by_shard(rows):
            part = self._read_shard(shard, dataset_rows)
            if features is None:
                features = np.empty((len(rows), self.num_features), dtype=part.dtype)
            elif features.dtype != part.dtype:  # missing rows are NaN, which uint8 cannot represent
                features = features.astype(np.float32)
            features[positions] = part
        return np.zeros((0, self.num_features), np.float32) if features is None else features

    def _read_shard(self, shard: int, dataset_rows: RowIndex) -> NDArray[Any]:
        task, start = self.tasks[shard], int(self.shard_starts[shard])
        # No copy: often only a few rows are read.
        vector = column_of(read_arrow(task.file(self.status.modality)), "vector")
        shard_usable = self.status.usable[start : start + task.shard.num_rows]
        if not shard_usable.any():
            return np.full((len(dataset_rows), self.num_features), np.nan, np.float32)
        # Nulls have no values. `flatten` would copy those of the whole shard where there is one, 100 MB of pictures.
        first, last = vector.offsets.to_numpy()[[0, -1]].tolist()
        usable_vectors = vector.values.to_numpy()[first:last].reshape(int(shard_usable.sum()), -1)
        is_usable = shard_usable[dataset_rows - start]
        vectors = usable_vectors[(np.cumsum(shard_usable) - 1)[dataset_rows - start][is_usable]]
        vectors = vectors if self.columns is None else vectors[:, self.columns]
        if is_usable.all():
            return np.asarray(vectors)
        part = np.full((len(dataset_rows), self.num_features), np.nan, np.float32)
        part[is_usable] = vectors
        return part


MIN_FEATURES = 8  # ours: of 7,442 clips with vectors of 6 small integers, 340 are equal to another by chance
# Ours: bits by which a row must be less probable than one chance pair in the dataset. The features are taken as
# independent; real ones are not, and 16 bits are the allowance for that.
MARGIN_BITS = 16.0
MAX_REPEATS = 10  # ours: rows per distinct vector above which vectors are categories; five captions share an image
SAMPLE_ROWS = 2048
FEATURE_BLOCK = 64


def recurring_rows(
    tasks: Sequence[EncodeTask], status: ModalityRows, contents: Callable[[int], NDArray[np.bytes_]]
) -> NDArray[np.bool_]:
    """Return a mask (n,) of the samples whose content in this modality recurs by chance.

    contents: returns the digests of the rows of a task, dtype S32. Only rows whose content occurs more than once are
    tested, so that without copies nothing is read.
    """
    modality, num_rows = status.modality, len(status.usable)
    if modality.kind == "text":
        return np.ones(num_rows, dtype=bool)
    if modality.kind != "features":
        return np.zeros(num_rows, dtype=bool)
    if (modality.length or 0) < MIN_FEATURES:
        return np.ones(num_rows, dtype=bool)
    digests = _Digests.of(tasks, status, contents)
    num_distinct, has_repeated, sample = 0, False, np.zeros(0, np.intp)
    for rows, is_first in digests.runs():
        num_distinct += int(is_first.sum())
        has_repeated |= not is_first.all()
        # Digests are uniform: the first contents in their order are a sample that does not depend on the rows' order.
        sample = np.concatenate([sample, rows[is_first][: SAMPLE_ROWS - len(sample)]])
    recurs = np.zeros(num_rows, dtype=bool)
    num_usable = len(digests.rows)
    if not has_repeated:
        return recurs
    if num_distinct * MAX_REPEATS < num_usable:
        return np.ones(num_rows, dtype=bool)
    vectors = FeatureMatrix.of(tasks, status, sample)
    sampled = vectors.read(np.arange(len(sample)))
    for rows, is_first in digests.runs():
        run = np.cumsum(is_first) - 1
        repeated = np.flatnonzero(np.bincount(run) > 1)
        first = rows[is_first][repeated]
        repeated, first = repeated[np.argsort(first)], np.sort(first)  # read in the order of the files
        inputs = replace(vectors, row=first)
        is_common = np.zeros(int(is_first.sum()), dtype=bool)
        for batch in chunks(inputs):
            is_common[repeated[batch]] = _is_common(inputs, batch, sampled, num_rows=num_usable)
        recurs[rows[is_common[run]]] = True
    return recurs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Digests:
    """Digests of the usable rows (u,) of a modality, of which the first half, high (u,), is in memory."""

    rows: NDArray[np.integer[Any]]
    high: NDArray[np.uint64]
    starts: NDArray[np.int64]
    contents: Callable[[int], NDArray[np.bytes_]]

    @classmethod
    def of(
        cls, tasks: Sequence[EncodeTask], status: ModalityRows, contents: Callable[[int], NDArray[np.bytes_]]
    ) -> _Digests:
        rows = true_rows(status.usable)
        starts = np.cumsum([0, *(task.shard.num_rows for task in tasks)])
        opened = cls(rows=rows, high=np.zeros(0, np.uint64), starts=starts, contents=contents)
        return replace(opened, high=opened.read(0, rows))

    def read(self, number: int, rows: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
        """Read the first or the second half of the digests of rows (b,), ascending."""
        words = np.empty(len(rows), np.uint64)
        bounds = np.searchsorted(rows, self.starts.astype(rows.dtype))
        for task in np.flatnonzero(np.diff(bounds)).tolist():
            own = slice(int(bounds[task]), int(bounds[task + 1]))
            digests = self.contents(task)[rows[own] - self.starts[task]]
            halves = digests.view("S16").reshape(-1, 2)[:, number]
            words[own] = np.frombuffer(bytes.fromhex(halves.tobytes().decode()), ">u8")
        return words

    def runs(self) -> Iterator[tuple[NDArray[np.integer[Any]], NDArray[np.bool_]]]:
        """Yield pieces of the rows in the order of their digests, and which are the first of equal ones."""
        for piece in sorted_pieces(self.high):
            high = self.high[piece]
            is_first = np.r_[True, high[1:] != high[:-1]]
            if not is_first.all():
                positions = np.sort(piece)
                low, high = self.read(1, self.rows[positions]), self.high[positions]
                order = np.lexsort((low, high))
                piece, high, low = positions[order], high[order], low[order]
                is_first = np.r_[True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])]
            yield self.rows[piece], is_first


def _is_common(inputs: Inputs, rows: RowIndex, sample: NDArray[np.float32], *, num_rows: int) -> NDArray[np.bool_]:
    """Return which vectors (b,) have an equal partner in `num_rows` rows by chance, by the frequencies of each number.

    A vector has sum_j -log2 p_j bits, where p_j is the share of the sample with its number in feature j. Of n rows,
    n^2 / 2 pairs meet by chance: 2 log2(n) bits make one such pair.
    """
    needed = 2 * np.log2(num_rows) + MARGIN_BITS
    vectors = inputs.read(rows)
    bits = np.zeros(len(rows))
    for start in range(0, vectors.shape[1], FEATURE_BLOCK):
        for feature in range(start, min(start + FEATURE_BLOCK, vectors.shape[1])):
            values, numbers = np.sort(sample[:, feature]), vectors[:, feature]
            count = np.searchsorted(values, numbers, side="right") - np.searchsorted(values, numbers)
            bits -= np.log2(np.maximum(count, 1) / len(values))
        if (bits >= needed).all():
            break
    return np.asarray(bits < needed)
