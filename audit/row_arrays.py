"""Arrays with an entry for each of many rows, gathered and sorted in pieces.

numpy converts indices to 64 bits and sorts into copies: of 10^9 rows each of these takes 8 GB. The functions here give
the results of the plain ones, which their names state, with temporary arrays of about a byte a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 1 << 18  # rows whose indices are converted at once, 2 MB of them
NUM_PIECES = 16  # of a sort; each is read from all keys, so that more pieces take less memory and more time
_MIN_PIECE = 1 << 16  # rows: fewer are sorted at once
_PIECE_BITS = np.uint64(60)


def index_type(num_rows: int) -> type[np.signedinteger[Any]]:
    """Return the integer type of indices of so many rows, of 32 bits below 2^31."""
    return np.int32 if num_rows < 1 << 31 else np.int64


def slices(num_rows: int, size: int | None = None) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` rows, by default CHUNK_ROWS."""
    size = size or CHUNK_ROWS
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def gather(values: NDArray[Any], rows: NDArray[np.integer[Any]], out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return values[rows]; `out` may be `rows` itself, whose type it then has."""
    result = np.empty((len(rows), *values.shape[1:]), values.dtype) if out is None else out
    for part in slices(len(rows)):
        result[part] = values[rows[part]]
    return result


def scatter(values: NDArray[Any], rows: NDArray[np.integer[Any]], out: NDArray[Any]) -> NDArray[Any]:
    """Set out[rows] = values, and return it."""
    for part in slices(len(rows)):
        out[rows[part]] = values[part]
    return out


def true_rows(mask: NDArray[np.bool_]) -> NDArray[np.integer[Any]]:
    """Return the rows of a mask (n,), ascending: np.flatnonzero."""
    rows = np.empty(int(np.count_nonzero(mask)), index_type(len(mask)))
    start = 0
    for part in slices(len(mask)):
        inside = np.flatnonzero(mask[part])
        rows[start : start + len(inside)] = inside + part.start
        start += len(inside)
    return rows


def positions_of(rows: NDArray[np.integer[Any]], num_rows: int) -> NDArray[np.integer[Any]]:
    """Return the position in `rows` of each of `num_rows` rows, negative of those that are not among them."""
    positions = np.full(num_rows, -1, index_type(num_rows))
    for part in slices(len(rows)):
        positions[rows[part]] = np.arange(part.start, part.stop)
    return positions


def count_codes(codes: NDArray[np.integer[Any]], num_codes: int) -> NDArray[np.int64]:
    """Count how often each code in [0, num_codes) occurs: np.bincount."""
    counts = np.zeros(num_codes, np.int64)
    for part in slices(len(codes)):
        counts += np.bincount(codes[part], minlength=num_codes)
    return counts


def sorted_pieces(keys: NDArray[np.uint64]) -> Iterator[NDArray[np.integer[Any]]]:
    """Yield np.argsort(keys, kind="stable") in consecutive pieces, of equal size where the keys are uniform."""
    if len(keys) <= _MIN_PIECE:
        yield np.argsort(keys, kind="stable")
        return
    piece_of_key = np.empty(len(keys), np.uint8)
    for part in slices(len(keys)):
        piece_of_key[part] = piece_of(keys[part], len(keys))
    for piece in range(NUM_PIECES):
        rows = _rows_equal(piece_of_key, piece)
        if len(rows):
            order = stable_argsort(gather(keys, rows))
            yield gather(rows, order)


def piece_of(keys: NDArray[np.uint64], num_rows: int) -> NDArray[np.uint8]:
    """Return the piece of a sort of so many rows that each key (b,) is in: all in the first if they are few."""
    return (keys >> _PIECE_BITS).astype(np.uint8) if num_rows > _MIN_PIECE else np.zeros(len(keys), np.uint8)


def _rows_equal(codes: NDArray[np.uint8], code: int) -> NDArray[np.integer[Any]]:
    """Return the rows of a code, ascending."""
    parts = [
        (np.flatnonzero(codes[part] == code) + part.start).astype(index_type(len(codes))) for part in slices(len(codes))
    ]
    return np.concatenate(parts)


def stable_argsort(keys: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Return the stable order of keys, which the faster sort has where no keys are equal."""
    order = np.argsort(keys)
    ordered = keys[order]
    return order if (ordered[1:] != ordered[:-1]).all() else np.argsort(keys, kind="stable")


def stable_order(keys: NDArray[np.uint64]) -> NDArray[np.integer[Any]]:
    """Return np.argsort(keys, kind="stable")."""
    order = np.empty(len(keys), index_type(len(keys)))
    start = 0
    for piece in sorted_pieces(keys):
        order[start : start + len(piece)] = piece
        start += len(piece)
    return order


def repeated_in(ordered: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the distinct values that occur more than once in ascending ones."""
    repeated = [ordered[1:][part][ordered[1:][part] == ordered[:-1][part]] for part in slices(max(0, len(ordered) - 1))]
    return np.unique(np.concatenate([ordered[:0], *repeated]))


def contains(ordered: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which values (b,) are among ascending ones."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    inside = np.empty(len(values), bool)
    for part in slices(len(values)):
        position = np.minimum(np.searchsorted(ordered, values[part]), len(ordered) - 1)
        inside[part] = ordered[position] == values[part]
    return inside


def smallest_rows(mask: NDArray[np.bool_] | None, key: NDArray[np.uint64], *, max_rows: int) -> NDArray[np.intp]:
    """Return the `max_rows` rows of a mask (n,) with the smallest keys (n,), ascending; None: of all rows.

    Of equal keys the first rows are taken.
    """
    num_rows = len(key) if mask is None else int(np.count_nonzero(mask))
    if num_rows <= max_rows:
        return np.arange(num_rows) if mask is None else np.flatnonzero(mask)
    top = np.zeros(1 << 16, np.int64)
    shift = np.uint64(48)
    for part in slices(len(key)):
        keys = key[part] if mask is None else key[part][mask[part]]
        top += np.bincount((keys >> shift).astype(np.intp), minlength=len(top))
    largest = np.uint64(np.searchsorted(np.cumsum(top), max_rows))  # leading bits that the last row taken has
    rows = []
    for part in slices(len(key)):
        is_small = (key[part] >> shift) <= largest
        rows.append(np.flatnonzero(is_small if mask is None else is_small & mask[part]) + part.start)
    small = np.concatenate(rows)
    return np.sort(small[np.argsort(key[small], kind="stable")[:max_rows]])
