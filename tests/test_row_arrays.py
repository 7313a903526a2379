"""Tests of arrays of many rows: their functions are those of numpy, in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from mmaudit.audit import row_arrays
from mmaudit.audit.row_arrays import (
    contains,
    count_codes,
    gather,
    index_type,
    positions_of,
    repeated_in,
    scatter,
    smallest_rows,
    sorted_pieces,
    stable_order,
    true_rows,
)

KEYS = arrays(np.uint64, st.integers(1, 60), elements=st.integers(0, 2**64 - 1) | st.integers(0, 3))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_arrays, "CHUNK_ROWS", 7)
    monkeypatch.setattr(row_arrays, "_MIN_PIECE", 5)


@given(KEYS)
def test_order_is_the_stable_one(keys: NDArray[np.uint64]) -> None:
    np.testing.assert_array_equal(stable_order(keys), np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(np.concatenate(list(sorted_pieces(keys))), np.argsort(keys, kind="stable"))


@given(KEYS, st.integers(1, 60), st.integers(0, 2**32))
def test_smallest_rows_are_the_first_in_the_order(keys: NDArray[np.uint64], max_rows: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random(len(keys)) < 0.6
    for rows, taken in ((np.flatnonzero(mask), mask), (np.arange(len(keys)), None)):
        expected = np.sort(rows[np.argsort(keys[rows], kind="stable")[:max_rows]])
        np.testing.assert_array_equal(smallest_rows(taken, keys, max_rows=max_rows), expected)


@given(KEYS, st.integers(0, 2**32))
def test_rows_are_gathered_scattered_and_counted(keys: NDArray[np.uint64], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(keys)).astype(np.int32)[: rng.integers(0, len(keys) + 1)]
    np.testing.assert_array_equal(gather(keys, rows), keys[rows])
    codes = (keys % np.uint64(4)).astype(np.int32)
    np.testing.assert_array_equal(gather(np.arange(9, 13, dtype=np.int32), codes.copy(), out=codes.copy()), codes + 9)
    np.testing.assert_array_equal(count_codes(codes, 4), np.bincount(codes, minlength=4))
    np.testing.assert_array_equal(true_rows(codes > 1), np.flatnonzero(codes > 1))
    position = positions_of(rows, len(keys))
    np.testing.assert_array_equal(position[rows], np.arange(len(rows)))
    assert (np.delete(position, rows) == -1).all()
    out = np.zeros(len(keys), np.uint64)
    np.testing.assert_array_equal(scatter(keys[rows], rows, out)[rows], keys[rows])


@given(KEYS, KEYS)
def test_repeated_values_are_found(keys: NDArray[np.uint64], others: NDArray[np.uint64]) -> None:
    values, counts = np.unique(keys, return_counts=True)
    np.testing.assert_array_equal(repeated_in(np.sort(keys)), values[counts > 1])
    np.testing.assert_array_equal(contains(values, others), np.isin(others, values))
    assert not contains(values[:0], others).any()


def test_indices_have_32_bits_where_that_is_enough() -> None:
    assert (index_type(2**31 - 1), index_type(2**31)) == (np.int32, np.int64)
