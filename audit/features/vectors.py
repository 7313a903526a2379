"""Vectors of the rows of one modality: columns of features, and the results of encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..arrow import flat_vectors
from ..dataset.cells import null_error
from ..dataset.modalities import Modality
from ..errors import DatasetError, Reason, UnusableError
from .terms import holds_terms

Vector = NDArray[Any]  # float32; uint8 for the pixels of a network's input, uint32 for the terms of a text
_CHECK_NUMBERS = 1 << 24  # numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedCell:
    """The vector of a cell, and the fingerprint of the decoded medium; empty where there is none."""

    vector: Vector
    fingerprint: bytes = b""


EncodeResult = EncodedCell | UnusableError


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRows:
    """Encoded rows of one modality.

    content: digest of each row (n,), 32 hexadecimal digits. usable: bool (n,). values: the vectors of the usable rows
    one after another, of these lengths (u,). problem: the error of each other row. fingerprint: of each row, None where
    there is none; () if no row has one.
    """

    content: NDArray[np.bytes_]
    usable: NDArray[np.bool_]
    values: Vector
    lengths: NDArray[np.intp]
    problem: dict[int, UnusableError]
    fingerprint: tuple[bytes | None, ...] = ()


def encode_vectors(column: pa.ChunkedArray, modality: Modality) -> EncodedRows:
    """Check a column of feature vectors, which are used unchanged; a million rows take a few seconds."""
    flat, offsets, valid = flat_vectors(column)
    start, end = offsets[:-1], offsets[1:]
    not_finite = _not_finite_positions(flat)
    num_not_finite = np.searchsorted(not_finite, end) - np.searchsorted(not_finite, start)
    fits = valid & (end - start == modality.length)
    usable = fits & (num_not_finite == 0)
    problem = {}
    for row in np.flatnonzero(~usable).tolist():
        if not valid[row]:
            problem[row] = null_error(modality.column)
        elif not fits[row]:
            problem[row] = _length_error(end[row] - start[row], modality)
        else:
            problem[row] = _not_finite_error(num_not_finite[row], modality)
    content = _row_digests(flat, np.where(valid, start, 0), np.where(valid, end, 0))
    vector = _usable_vectors(flat, start, usable, int(modality.length or 0))
    lengths = np.full(len(vector), vector.shape[1], dtype=np.intp)
    return EncodedRows(content=content, usable=usable, values=vector.ravel(), lengths=lengths, problem=problem)


def check_vector(vector: NDArray[np.float32], modality: Modality) -> NDArray[np.float32] | UnusableError:
    """Return a vector (d,) that was loaded from a file, or why it cannot be used."""
    if len(vector) != modality.length:
        return _length_error(len(vector), modality)
    num_not_finite = int((~np.isfinite(vector)).sum())
    return _not_finite_error(num_not_finite, modality) if num_not_finite else vector


def _length_error(length: int, modality: Modality) -> UnusableError:
    return UnusableError(Reason.WRONG_LENGTH, f"{length} numbers; most rows have {modality.length}")


def _not_finite_error(count: int, modality: Modality) -> UnusableError:
    return UnusableError(Reason.NOT_FINITE, f"{count} of {modality.length} numbers are not finite")


def _not_finite_positions(flat: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return the positions of non-finite numbers, by block: a full mask would take a quarter of the numbers' memory."""
    starts = range(0, len(flat), _CHECK_NUMBERS)
    positions = [start + np.flatnonzero(~np.isfinite(flat[start : start + _CHECK_NUMBERS])) for start in starts]
    return np.concatenate([np.zeros(0, np.intp), *positions])


def _row_digests(flat: NDArray[np.float32], start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """Return hashing.digest of each row's bytes (n,), without copying them."""
    view = memoryview(np.ascontiguousarray(flat).view(np.uint8).data)
    digests = np.empty(len(start), dtype="S32")
    for row, (first, last) in enumerate(zip((4 * start).tolist(), (4 * end).tolist(), strict=True)):
        hasher = hashlib.blake2b((last - first).to_bytes(8, "little"), digest_size=16)
        hasher.update(view[first:last])
        digests[row] = hasher.hexdigest().encode()
    return digests


def _usable_vectors(
    flat: NDArray[np.float32], start: NDArray[np.int64], usable: NDArray[np.bool_], length: int
) -> NDArray[np.float32]:
    if usable.all() and len(usable) and start[-1] - start[0] == length * (len(usable) - 1):
        return np.asarray(flat[start[0] : start[0] + length * len(usable)]).reshape(len(usable), length)
    positions = start[usable][:, None] + np.arange(length)
    return np.asarray(flat[positions], dtype=np.float32)


def combine_results(content: Sequence[bytes], results: Sequence[EncodeResult], *, modality: Modality) -> EncodedRows:
    """Combine the vector or error of each row; DatasetError if vectors differ in length."""
    vectors = [result.vector for result in results if not isinstance(result, UnusableError)]
    lengths = np.array([len(vector) for vector in vectors], dtype=np.intp)
    check_lengths(set(lengths.tolist()), modality)
    return EncodedRows(
        content=np.array(content, dtype="S32"),
        usable=np.array([not isinstance(result, UnusableError) for result in results], dtype=bool),
        values=np.concatenate(vectors) if vectors else np.zeros(0, np.float32),
        lengths=lengths,
        problem={row: result for row, result in enumerate(results) if isinstance(result, UnusableError)},
        fingerprint=tuple(
            None if isinstance(result, UnusableError) else result.fingerprint or None for result in results
        ),
    )


def check_lengths(lengths: set[int], modality: Modality) -> None:
    """Raise DatasetError if vectors of a modality have more than one length, unless they are terms of texts."""
    if len(lengths) > 1 and not holds_terms(modality):
        raise DatasetError(
            f"{modality.name}: {modality.encoder} returns vectors of {min(lengths)} and of {max(lengths)} numbers; "
            "vectors of a modality must have the same length"
        )
