"""Features of the rows of probes and networks, read in chunks: in memory, or those of several modalities together.

Texts are stored as hashed terms. `read` returns them as vectors of a fixed length, as for all other modalities;
`read_terms` as sparse rows, and `Numbers` is the inputs without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, hstack

from .vectors import project_terms, weigh_terms

RowIndex = NDArray[np.integer[Any]]  # of 32 bits where there are many
CHUNK_BYTES = 32 << 20  # read at once: large enough for efficient matrix products


class Inputs(Protocol):
    """n rows of d features, float32 or uint8, with random access. Features of a missing modality are NaN."""

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""

    @property
    def num_features(self) -> int:
        """Number of features, d."""

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""


@runtime_checkable
class TextInputs(Inputs, Protocol):
    """Inputs that may hold hashed terms of texts, as sparse rows next to d features."""

    @property
    def num_numbers(self) -> int:
        """Number of features without those of texts."""

    def read_numbers(self, rows: RowIndex) -> NDArray[Any]:
        """Read the features of these rows without those of texts: (len(rows), num_numbers)."""

    def read_terms(self, rows: RowIndex) -> csr_array | None:
        """Read the weights of terms of these rows, see weigh_terms: (len(rows), t); None without texts."""

    def in_memory(self, rows: RowIndex) -> Inputs:
        """Read these rows into memory."""

    def reading_order(self, rows: RowIndex) -> RowIndex:
        """Return the order (b,) in which these rows are read sequentially from their files."""


def has_terms(inputs: Inputs) -> bool:
    """Return whether the inputs hold hashed terms of texts."""
    return read_terms(inputs, np.zeros(0, np.intp)) is not None


def read_terms(inputs: Inputs, rows: RowIndex) -> csr_array | None:
    """Read the weights of terms of these rows: (len(rows), t), empty in rows without text; None without texts."""
    return inputs.read_terms(rows) if isinstance(inputs, TextInputs) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The features of inputs without those of texts."""

    inputs: Inputs

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return self.inputs.num_rows

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        return self.inputs.num_numbers if isinstance(self.inputs, TextInputs) else self.inputs.num_features

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        return self.inputs.read_numbers(rows) if isinstance(self.inputs, TextInputs) else self.inputs.read(rows)


def chunks(inputs: Inputs, rows: RowIndex | None = None, *, max_bytes: int = CHUNK_BYTES) -> Iterator[RowIndex]:
    """Yield the rows, by default all, in chunks of at most `max_bytes` of float32 features, but at least 256 rows."""
    rows = np.arange(inputs.num_rows) if rows is None else rows
    size = max(256, max_bytes // (4 * max(1, inputs.num_features)))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def reading_order(inputs: Inputs, rows: RowIndex) -> RowIndex:
    """Return the order (b,) in which these rows are read sequentially from their files."""
    if isinstance(inputs, Numbers):
        return reading_order(inputs.inputs, rows)
    return inputs.reading_order(rows) if isinstance(inputs, TextInputs) else np.argsort(rows, kind="stable")


def in_memory(inputs: Inputs, rows: RowIndex) -> Inputs:
    """Read rows of the inputs into memory."""
    return inputs.in_memory(rows) if isinstance(inputs, TextInputs) else MatrixInputs(matrix=inputs.read(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixInputs:
    """A matrix (n, d) in memory."""

    matrix: NDArray[Any]

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return len(self.matrix)

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        return int(self.matrix.shape[1])

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d). Consecutive rows are returned as a view."""
        if len(rows) and (np.diff(rows) == 1).all():
            return self.matrix[rows[0] : rows[-1] + 1]
        return np.asarray(self.matrix[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class TermInputs:
    """Counts of the hashed terms of n texts (n, NUM_TERMS) in memory.

    present (n,): the rows that have a text. Dense vectors have these `columns` of `num_buckets`; None: all.
    """

    counts: csr_array
    present: NDArray[np.bool_]
    num_buckets: int
    columns: RowIndex | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return int(self.counts.shape[0])

    @property
    def num_features(self) -> int:
        """Number of features of the dense vectors, d."""
        return self.num_buckets if self.columns is None else len(self.columns)

    @property
    def num_numbers(self) -> int:
        """Number of features without those of texts: none."""
        return 0

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        vectors = project_terms(self.counts[rows], self.num_buckets)
        vectors[~self.present[rows]] = np.nan
        return vectors if self.columns is None else vectors[:, self.columns]

    def read_numbers(self, rows: RowIndex) -> NDArray[Any]:
        """Read no features of these rows: (len(rows), 0)."""
        return np.zeros((len(rows), 0), np.float32)

    def read_terms(self, rows: RowIndex) -> csr_array | None:
        """Read the weights of terms of these rows: (len(rows), NUM_TERMS)."""
        return weigh_terms(self.counts[rows])

    def in_memory(self, rows: RowIndex) -> Inputs:
        """Return these rows."""
        return replace(self, counts=self.counts[rows], present=self.present[rows])

    def reading_order(self, rows: RowIndex) -> RowIndex:
        """Return the order (b,) in which these rows are read sequentially."""
        return np.argsort(rows, kind="stable")


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowInputs:
    """Consecutive rows in memory, from `first`, of n rows; only these can be read."""

    num_rows: int
    first: int
    inputs: Inputs

    @classmethod
    def of(cls, inputs: Inputs, rows: RowIndex) -> WindowInputs:
        """Read consecutive rows of `inputs` into memory."""
        return cls(num_rows=inputs.num_rows, first=int(rows[0]), inputs=in_memory(inputs, rows))

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        return self.inputs.num_features

    @property
    def num_numbers(self) -> int:
        """Number of features without those of texts."""
        return Numbers(inputs=self.inputs).num_features

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        return self.inputs.read(rows - self.first)

    def read_numbers(self, rows: RowIndex) -> NDArray[Any]:
        """Read the features of these rows without those of texts."""
        return Numbers(inputs=self.inputs).read(rows - self.first)

    def read_terms(self, rows: RowIndex) -> csr_array | None:
        """Read the weights of terms of these rows."""
        return read_terms(self.inputs, rows - self.first)

    def in_memory(self, rows: RowIndex) -> Inputs:
        """Return these rows."""
        return in_memory(self.inputs, rows - self.first)

    def reading_order(self, rows: RowIndex) -> RowIndex:
        """Return the order (b,) in which these rows are read sequentially."""
        return np.argsort(rows, kind="stable")


@dataclass(frozen=True, slots=True, kw_only=True)
class JointInputs:
    """Concatenated features of several inputs of the same n rows. Parts in `masked` read as NaN, as if missing."""

    parts: tuple[Inputs, ...]
    masked: frozenset[int] = frozenset()

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return self.parts[0].num_rows

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        return sum(part.num_features for part in self.parts)

    @property
    def num_numbers(self) -> int:
        """Number of features without those of texts."""
        return sum(Numbers(inputs=part).num_features for part in self.parts)

    def mask(self, parts: frozenset[int]) -> JointInputs:
        """Return the same rows with these parts masked."""
        return replace(self, masked=parts)

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        return self._concatenate(self.parts, rows)

    def read_numbers(self, rows: RowIndex) -> NDArray[Any]:
        """Read the features of these rows without those of texts."""
        return self._concatenate([Numbers(inputs=part) for part in self.parts], rows)

    def read_terms(self, rows: RowIndex) -> csr_array | None:
        """Read the weights of terms of these rows, the texts of several modalities side by side."""
        terms = [read_terms(part, rows[:0] if index in self.masked else rows) for index, part in enumerate(self.parts)]
        texts = [part for part in terms if part is not None]
        padded = [part if part.shape[0] else csr_array((len(rows), part.shape[1]), dtype=np.float32) for part in texts]
        return hstack(padded, format="csr") if padded else None

    def parts_of_columns(self, terms: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the index of the part of each column of `read_numbers`, and of these columns of `read_terms`."""
        texts = [read_terms(part, np.empty(0, np.intp)) for part in self.parts]
        num_numbers = [Numbers(inputs=part).num_features for part in self.parts]
        ends = np.cumsum([0 if text is None else text.shape[1] for text in texts])
        return np.repeat(np.arange(len(self.parts)), num_numbers), np.searchsorted(ends, terms, side="right")

    def in_memory(self, rows: RowIndex) -> Inputs:
        """Read these rows into memory."""
        return replace(self, parts=tuple(in_memory(part, rows) for part in self.parts))

    def reading_order(self, rows: RowIndex) -> RowIndex:
        """Return the order (b,) in which these rows are read sequentially from the files of the first part."""
        return reading_order(self.parts[0], rows)

    def _concatenate(self, parts: Sequence[Inputs], rows: RowIndex) -> NDArray[Any]:
        features = np.full((len(rows), sum(part.num_features for part in parts)), np.nan, np.float32)
        end = 0
        for index, part in enumerate(parts):
            start, end = end, end + part.num_features
            if index not in self.masked:
                features[:, start:end] = part.read(rows)
        return features
